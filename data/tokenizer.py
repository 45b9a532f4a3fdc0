"""Text <-> token ids behind four calls: encode, decode, stop_ids, vocab_size.

tokenizer.json files (ours: char, byte, BPE; everyone's fast ones) are read by the `tokenizers` library alone:
importing transformers costs seconds. A directory without one (sentencepiece only) goes through transformers'
AutoTokenizer.
"""
import hashlib
import json
import os

from configurator import UserError

# one of them makes a directory a tokenizer's
TOKENIZER_FILES = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
NAMED_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
# where tokenizer_config.json lists tokens that have no name
EXTRA_TOKENS = ('additional_special_tokens', 'extra_special_tokens')
TOKEN_FIELDS = ('content', 'single_word', 'lstrip', 'rstrip', 'normalized', 'special')


def read_json(path):
    """The object in a JSON file; {} where there is no such file. UserError where it does not parse, or is no
    object."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8-sig') as file:     # an editor's byte order mark is no JSON
            value = json.load(file)
    except (ValueError, OSError) as error:
        raise UserError(f'{path}: not readable as JSON ({error}); '
                        'copy the file again from its source') from None
    if not isinstance(value, dict):
        raise UserError(f'{path}: expected a JSON object, not {str(value)[:40]}; '
                        'copy the file again from its source')
    return value


def token_text(token):
    """The text of a token as tokenizer_config.json has it: a string, or an object with its content."""
    return token['content'] if isinstance(token, dict) else token


class Tokenizer:
    """A tokenizer.json and what stands beside it.

    text: the content of tokenizer.json;  config: that of tokenizer_config.json;  stop_ids: more ids that end
    a turn;  generation: the content of generation_config.json. `special` maps 'bos_token', 'eos_token', ...
    to strings; `chat_template` is a string, a dict by name, or None; `sha256` is the hash of tokenizer.json,
    by which data and models recognise one another's ids.
    """

    def __init__(self, text, config=None, stop_ids=(), chat_template=None, generation=None):
        import tokenizers
        try:
            self.backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:      # the library raises bare ones
            raise UserError(f'tokenizer.json: not a tokenizer '
                            f'of the `tokenizers` library ({error})') from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config, self.generation = dict(config or {}), dict(generation or {})
        self.chat_template = chat_template
        self.special = {name: token_text(self.config[name])
                        for name in NAMED_TOKENS if self.config.get(name)}
        self.text = self.backend.to_str() if self._add_missing_tokens() else text
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        self.bos_id = self.id_of(self.special.get('bos_token'))
        self.eos_id = self.id_of(self.special.get('eos_token'))
        self.pad_id = self.id_of(self.special.get('pad_token'))
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        # a config.json may name ids of another tokenizer
        known = [token for token in stop_ids if token in vocabulary.values()]
        self.stop_ids = frozenset({self.eos_id, self.id_of('<|im_end|>'), *known} - {None})
        self.without_embedding = {}
        # A char tokenizer drops what it does not know, or turns it into <unk>: there every new character is
        # tried once.
        plain = self.backend.get_vocab(with_added_tokens=False).keys() - self.special.values()
        self.tried = set() if all(len(token) == 1 for token in plain) else None
        # Metaspace tokenizers put a space before every text: an anchor in front, cut off again, keeps it out
        # of a text that continues another one.
        adds_space = self.tried is None and self.decode(self.encode('0') * 2).strip() != '00'
        self.anchor = '\n' if adds_space else ''

    def _add_missing_tokens(self):
        """Tokens that tokenizer_config.json declares and tokenizer.json lacks become the next ids, in the
        order that transformers takes. Returns how many there were."""
        from tokenizers import AddedToken
        missing = {}                # content -> AddedToken
        declared = self.config.get('added_tokens_decoder', {})
        for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
            settings = {key: token[key] for key in TOKEN_FIELDS if key in token}
            missing[token['content']] = AddedToken(**settings)
        others = [token for key, token in self.config.items()
                  if key.endswith('_token') and key not in NAMED_TOKENS and isinstance(token, (str, dict))]
        for key in EXTRA_TOKENS:
            extra = self.config.get(key) or []
            others += extra.values() if isinstance(extra, dict) else extra
        for content in (*self.special.values(), *map(token_text, others)):
            missing.setdefault(content, AddedToken(content, special=True))
        present = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        return self.backend.add_tokens([missing[content] for content in missing if content not in present])

    def restrict(self, num_embeddings):
        """From now on a text with a token that has no row in a model's embedding is refused: many tokenizers
        hold tokens that were added without one."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.without_embedding = {id: token for token, id in vocabulary.items() if id >= num_embeddings}
        self.stop_ids = self.stop_ids - self.without_embedding.keys()

    def refuse_without_embedding(self, ids):
        for id in self.without_embedding.keys() & set(ids):
            raise UserError(f'the text has the token {self.without_embedding[id]!r} (id {id}), for which the '
                            'model has no embedding: leave it out of the data and the chat template, or give '
                            'the model one in transformers (model.resize_token_embeddings(len(tokenizer)), '
                            'save_pretrained)')

    def id_of(self, token):
        """The id of one token, None where the vocabulary does not have it."""
        return self.backend.token_to_id(token) if token else None

    def encode(self, text):
        """text -> list of ids. Special tokens in the text become their ids; none is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, continued=False):
        """list of texts -> list of lists of ids; continued: each text goes on where other ids end."""
        if self.tried is not None:
            self._refuse_unknown(texts)
        anchor = self.anchor if continued else ''
        cut = len(self.backend.encode(anchor, add_special_tokens=False).ids) if anchor else 0
        texts = [anchor + text for text in texts]
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:           # so the library says that it is no Unicode
            raise UserError('a text has half a character (a surrogate without its other half): repair '
                            'it') from None
        if self.without_embedding:
            for encoding in encodings:
                self.refuse_without_embedding(encoding.ids)
        return [encoding.ids[cut:] for encoding in encodings]

    def decode(self, ids, skip_special_tokens=False):
        """ids -> text, special tokens spelled out unless they are skipped."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _refuse_unknown(self, texts):
        fresh = set().union(*texts) - self.tried
        unknown = sorted(character for character in fresh if not self._knows(character))
        if unknown:
            shown = ', '.join(repr(character) for character in unknown[:10])
            raise UserError(f'the tokenizer has no token for {shown}: it knows only the characters of the '
                            'text that it was made from; leave these '
                            'out, or prepare the data with --tokenizer bpe')

    def _knows(self, character):
        try:
            ids = self.backend.encode(character, add_special_tokens=False).ids
        except Exception:           # WordLevel without an <unk> raises a bare one
            return False
        known = self.decode(ids) == character
        if known:
            self.tried.add(character)
        return known

    def save(self, directory):
        """Writes what AutoTokenizer opens: tokenizer.json (byte for byte what was read),
        tokenizer_config.json and chat_template.jinja."""
        os.makedirs(directory, exist_ok=True)
        config = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'clean_up_tokenization_spaces': False,
            **self.config,
        }
        if isinstance(self.chat_template, dict):
            templates = self.chat_template.items()
            config['chat_template'] = [{'name': name, 'template': template} for name, template in templates]
        elif self.chat_template:
            write_text(directory, 'chat_template.jinja', self.chat_template)
        write_text(directory, 'tokenizer.json', self.text)
        write_text(directory, 'tokenizer_config.json', to_json(config))
        # what ends a turn is neither in a tokenizer's files nor, beside an adapter, in a config.json
        write_text(directory, 'generation_config.json', to_json({**self.generation, **self.named_ids()}))

    def named_ids(self):
        """What config.json and generation_config.json say of these ids: one, or a list of several that stop;
        without those that there are not."""
        stops = sorted(self.stop_ids)
        ids = {'bos_token_id': self.bos_id, 'pad_token_id': self.pad_id,
               'eos_token_id': stops if len(stops) > 1 else next(iter(stops), None)}
        return {key: value for key, value in ids.items() if value is not None}


def to_json(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + '\n'


def write_text(directory, name, text):
    """One UTF-8 file with the line ends as they are in the text."""
    with open(os.path.join(directory, name), 'w', encoding='utf-8', newline='') as file:
        file.write(text)


def load_tokenizer(name):
    """A Hugging Face model directory, or a data directory that holds a tokenizer.json, -> Tokenizer. What has
    no tokenizer.json (sentencepiece, vocab.json + merges.txt, a hub name) is converted by transformers."""
    path = os.path.join(name, 'tokenizer.json')
    config = read_json(os.path.join(name, 'tokenizer_config.json'))
    if os.path.exists(path):
        with open(path, encoding='utf-8-sig', newline='') as file:
            text = file.read()
        if 'added_tokens_decoder' not in config:            # the older files, as transformers reads them
            config.update(read_json(os.path.join(name, 'special_tokens_map.json')))
            config.update(older_tokens(name, config))
        template = config.pop('chat_template', None)
    else:
        text, config, template = convert(name)
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}
    template_file = os.path.join(name, 'chat_template.jinja')
    if os.path.exists(template_file):
        with open(template_file, encoding='utf-8-sig', newline='') as file:
            template = file.read()
    generation = read_json(os.path.join(name, 'generation_config.json'))
    stop_ids = []
    for file in (read_json(os.path.join(name, 'config.json')), generation):
        ends = file.get('eos_token_id')
        stop_ids += ends if isinstance(ends, list) else [ends]
    try:
        return Tokenizer(text, config, stop_ids, template, generation)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{name}: tokenizer_config.json declares its tokens in a form that is not known '
                        f'({type(error).__name__}: {error}); copy the file again from its source') from None


def older_tokens(name, config):
    """The {content: id} of a directory's added_tokens.json as tokenizer_config.json has them today."""
    ids = read_json(os.path.join(name, 'added_tokens.json'))
    special = {token_text(config[key]) for key in NAMED_TOKENS if config.get(key)}
    tokens = {}
    for content, id in ids.items():
        is_special = content in special
        tokens[str(id)] = {'content': content, 'special': is_special, 'normalized': not is_special}
    return {'added_tokens_decoder': tokens} if tokens else {}


def convert(name):
    """Another form of tokenizer that transformers opens -> (text of its tokenizer.json, config, template)."""
    from transformers import AutoTokenizer
    try:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        text = theirs.backend_tokenizer.to_str()
    except Exception as error:      # whatever the cause, this directory or name cannot be used
        reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise UserError(f'{name}: no tokenizer.json, and transformers cannot make one ({reason}); name a '
                        'directory with a tokenizer.json, or save one there with '
                        'AutoTokenizer(...).save_pretrained') from None
    named = {key: getattr(theirs, key) for key in NAMED_TOKENS}
    config = {key: token for key, token in named.items() if token}
    return text, config, theirs.chat_template
