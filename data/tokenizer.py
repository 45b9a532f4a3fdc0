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
NAMED_TOKENS = ('bos_token', 'eos_token', 'pad_token', 'unk_token')


def read_json(path):
    """The object in a JSON file; {} where there is no such file. UserError where it does not parse."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8-sig') as file:     # an editor's byte order mark is no JSON
            return json.load(file)
    except (ValueError, OSError) as error:
        raise UserError(f'{path}: not readable as JSON ({error}); '
                        'copy the file again from its source') from None


class Tokenizer:
    """A tokenizer.json and what stands beside it.

    text: the content of tokenizer.json;  config: that of tokenizer_config.json;  stop_ids: more ids that end
    a turn. `special` maps 'bos_token', 'eos_token', ... to strings; `chat_template` is a string, a dict by
    name, or None; `sha256` is the hash of tokenizer.json, by which data and models recognise one another's
    ids.
    """

    def __init__(self, text, config=None, stop_ids=(), chat_template=None):
        import tokenizers
        try:
            self.backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:      # the library raises bare ones
            raise UserError(f'tokenizer.json: not a tokenizer '
                            f'of the `tokenizers` library ({error})') from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.text, self.config = text, dict(config or {})
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.chat_template = chat_template
        named = {name: self.config.get(name) for name in NAMED_TOKENS}
        self.special = {name: token['content'] if isinstance(token, dict) else token
                        for name, token in named.items() if token}
        self.bos_id = self.id_of(self.special.get('bos_token'))
        self.eos_id = self.id_of(self.special.get('eos_token'))
        self.pad_id = self.id_of(self.special.get('pad_token'))
        ends = {self.eos_id, self.id_of('<|im_end|>'), *stop_ids}
        self.stop_ids = frozenset(ends - {None})
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        # A char tokenizer drops what it does not know, or turns it into <unk>: there every new character is
        # tried once.
        plain = self.backend.get_vocab(with_added_tokens=False).keys() - self.special.values()
        self.tried = set() if all(len(token) == 1 for token in plain) else None
        # Metaspace tokenizers put a space before every text: an anchor in front, cut off again, keeps it out
        # of a text that continues another one.
        adds_space = self.tried is None and self.decode(self.encode('0') * 2).strip() != '00'
        self.anchor = '\n' if adds_space else ''

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
        config = json.dumps(config, indent=2, ensure_ascii=False)
        write_text(directory, 'tokenizer_config.json', config + '\n')


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
        if not any(config.get(key) for key in NAMED_TOKENS):
            config.update(read_json(os.path.join(name, 'special_tokens_map.json')))
        template = config.pop('chat_template', None)
    else:
        text, config, template = convert(name)
    if isinstance(template, list):
        template = {entry['name']: entry['template'] for entry in template}
    template_file = os.path.join(name, 'chat_template.jinja')
    if os.path.exists(template_file):
        with open(template_file, encoding='utf-8-sig', newline='') as file:
            template = file.read()
    stop_ids = set()
    for file in ('config.json', 'generation_config.json'):
        ends = read_json(os.path.join(name, file)).get('eos_token_id')
        stop_ids.update(ends if isinstance(ends, list) else [ends])
    return Tokenizer(text, config, stop_ids, template)


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
