"""Messages -> token ids and a loss mask, once, for every script; and tool calls read back from text.

A chat is a list of {'role', 'content', ...} with roles system, developer, user, assistant, tool; an assistant
may have 'tool_calls', arguments as an object or as a JSON string. The model's own template renders it, ours
(CHAT_TEMPLATE) where it has none. What an assistant said is found by rendering the chat up to there: that
text must begin the whole.

A message is text. Where it, a tool call or a tool spells a token that begins or ends turns (<|im_end|>,
</s>), it is encoded in pieces, as any other text: nobody's words become a turn, in no script, and `remarks`
says of which chats that is so. Tokens that are no part of the frame (<think>, <|python_tag|>) stay what they
are. Who wants them all writes the whole text himself: rows of `text`, or texts as prompt and completion.
A template that drops tool calls or what tools returned is an error; one that drops the tools is said.
"""
import datetime
import functools
import json
import re
from dataclasses import dataclass

import jinja2
import jinja2.ext
import jinja2.sandbox

from configurator import UserError

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
# Stands within a token that a message spells till it is encoded: Unicode reserves it for use inside a program
APART = '\ufdd0'
# kind of remark on a chat: what it means
REMARKS = {
    'chats that spell a turn token':
        'it is encoded as plain text, and is no turn (was a chat template applied to them before? Then leave '
        'it out, or give them as texts)',
    'chats whose tools are not written':
        "the model's chat template leaves them out, so it is not told what it can call; put a "
        'chat_template.jinja that writes them beside the model',
}

# ChatML: roles between <|im_start|> and <|im_end|>, tools as JSON schemas in the system turn, one <tool_call>
# per call.
CHAT_TEMPLATE = '''\
{%- set first = messages[0] if messages else {} %}
{%- set rest = messages[1:] if first.role in ['system', 'developer'] else messages %}
{%- if tools or first.role in ['system', 'developer'] %}
    {{- '<|im_start|>system\\n' }}
    {%- if first.role in ['system', 'developer'] %}{{ first.content }}{{ '\\n' if tools }}{% endif %}
    {%- if tools %}
        {{- '<tools>' }}
        {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
        {{- '\\n</tools>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in rest %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'tool' %}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
    {%- else %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first }}
            {{- '<tool_call>{"name": ' + call.function.name | tojson + ', "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else \
call.function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
'''


@dataclass
class Rendered:
    """ids of one chat and, for each, whether it is a target. `skipped`: assistant turns that are context only
    because the template rewrites them later in the chat. `stop_added`: the template ends its turns without a
    stop token, so the tokenizer's was put at the end."""
    ids: list
    mask: list
    skipped: int = 0
    stop_added: bool = False


def render(tokenizer, messages, tools=None, loss_on='completion', add_generation_prompt=False, **variables):
    """One chat -> Rendered. loss_on: 'completion' (the last message, an assistant's), 'assistant' (all of its
    turns) or 'all'; the stop token is a target, what a template writes after it is not.
    add_generation_prompt ends the chat where the model is to speak: then no message is a completion.
    variables go to the template (enable_thinking=False). UserError: a chat or a template that cannot be
    rendered so."""
    chat = segments(tokenizer, messages, tools, loss_on, add_generation_prompt, **variables)
    return encode(tokenizer, [chat])[0]


def prompt_ids(tokenizer, messages, tools=None, **variables):
    """The ids after which the model is to answer these messages."""
    return render(tokenizer, messages, tools, 'completion', True, **variables).ids


def fold_system(tokenizer, messages):
    """A chat as this tokenizer's template can say it: where that has no system role (Gemma's refuses it, some
    drop it), a system message begins the user's after it."""
    system, *rest = messages
    if system['role'] != 'system' or has_system_role(tokenizer):
        return messages
    content = f'{system["content"]}\n\n{rest[0]["content"]}'
    return [{**rest[0], 'content': content}, *rest[1:]]


@functools.lru_cache(maxsize=16)
def has_system_role(tokenizer):
    user = {'role': 'user', 'content': 'a'}
    try:
        with_rules = prompt_ids(tokenizer, [{'role': 'system', 'content': 'b'}, user])
        return with_rules != prompt_ids(tokenizer, [user])
    except UserError:
        return False


def ids_between_turns(tokenizer, messages, last_token):
    """The ids that stand between a turn of the assistant, which was sampled, and its next one: the end of its
    turn but for last_token, which it wrote itself where that ends turns; messages that answer it; and what
    begins a turn. They are encoded by themselves, so that what was sampled stays as it was.

    They do not depend on the chat so far: the template is given a short one of its own. UserError: as in
    `render`.
    """
    template = template_of(tokenizer)
    messages = normal_messages(messages, 'developer' in template)
    refuse_what_is_left_out(tokenizer, template, messages, None)
    if spelled := spelled_marks(tokenizer, template, messages, None):
        messages = set_apart(spelled, messages)
    user, reply = PROBE[0], PROBE[3]
    chat = apply(tokenizer, template, [user, reply, *messages], None, True, {})
    _, found, between = chat.partition(reply['content'])
    if not found:
        raise UserError('chat template: it leaves out what the assistant said before, so that a chat of '
                        'several turns cannot go on; put another chat_template.jinja beside the model')
    space, found, rest = between.partition(tokenizer.backend.id_to_token(last_token))
    if found and not space.strip():
        between = rest
    return sum(tokenizer.encode_batch(between.split(APART), continued=True), [])


def render_rows(tokenizer, messages, tools=None, loss_on='completion', **variables):
    """The training rows of one chat: one; but with loss_on='assistant' and a template that rewrites earlier
    turns (drops their <think>, say) a row for every turn, each as the model sees it when it speaks."""
    whole = render(tokenizer, messages, tools, loss_on, **variables)
    if not whole.skipped:
        return [whole]
    turns = target_turns(messages, 'assistant', False)
    return [render(tokenizer, messages[:i + 1], tools, 'completion', **variables) for i in turns]


def segments(tokenizer, messages, tools=None, loss_on='completion', add_generation_prompt=False, **variables):
    """The text of a chat cut where the loss mask changes: ([(text, is_target), ...], skipped turns).

    Apart from `encode`, so that a data set is encoded in large batches.
    """
    template = template_of(tokenizer, tools)
    messages = normal_messages(messages, 'developer' in template)
    tools = normal_tools(tools)
    refuse_what_is_left_out(tokenizer, template, messages, tools)
    spelled = spelled_marks(tokenizer, template, messages, tools)
    if spelled:
        messages, tools = set_apart(spelled, messages), set_apart(spelled, tools)
    pieces, skipped = cut_turns(tokenizer, template, messages, tools, loss_on, add_generation_prompt,
                                variables)
    return [(part, is_target) for text, is_target in pieces for part in text.split(APART)], skipped


def cut_turns(tokenizer, template, messages, tools, loss_on, add_generation_prompt, variables):
    """What `segments` returns, of messages that are checked."""
    def text_until(end, prompt):
        return apply(tokenizer, template, messages[:end], tools, prompt, variables)

    full = text_until(len(messages), add_generation_prompt)
    if loss_on == 'all' and all(is_learned(message) for message in messages):
        chat = text_until(len(messages), False)
        return [(chat, True), (full[len(chat):], False)], 0
    turns = target_turns(messages, loss_on, add_generation_prompt)
    if (add_generation_prompt or turns) and lacks_generation_prompt(tokenizer, template):
        raise UserError('chat template: it has no generation prompt, the model would have to begin its own '
                        'turn; end the template with '
                        '{% if add_generation_prompt %} and the words that open a reply')
    is_inside = loss_on != 'all'        # whether the turns are what is learned, or all but them
    pieces, position, skipped = [], 0, 0
    for i in turns:
        before = text_until(i, True)
        after = text_until(i + 1, False) if i + 1 < len(messages) else full
        start, end = len(before), len(after)
        if not (full.startswith(after) and after.startswith(before) and position <= start < end):
            skipped += 1
            continue
        pieces.append((full[position:start], not is_inside))
        pieces.append((full[start:end], is_inside))
        position = end
    if turns and skipped == len(turns):
        raise UserError(f'chat template: the prompt is not the beginning of the whole chat, so the '
                        f'completion cannot be told apart (one has {before[-40:]!r} where the other has '
                        f'{full[:start][-40:]!r}); use a template that writes a turn in the same way before '
                        'and after it is answered')
    pieces.append((full[position:], not is_inside))
    return pieces, skipped


def is_learned(message):
    """Whether an answer may be a target: in OpenAI's format one with "weight": 0 is context only."""
    return message.get('weight') != 0


def target_turns(messages, loss_on, add_generation_prompt):
    """The indices of the messages that are learned with loss_on='completion' or 'assistant'; with 'all', of
    those that are not."""
    turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
    if loss_on == 'all':
        return [i for i in turns if not is_learned(messages[i])]
    turns = [i for i in turns if is_learned(messages[i])]
    if loss_on == 'assistant':
        return turns
    if loss_on != 'completion':
        raise UserError(f'loss_on={loss_on!r}: one of completion, assistant, all')
    if add_generation_prompt:
        return []
    if messages[-1]['role'] != 'assistant':
        raise UserError(f'messages: the last one is from {messages[-1]["role"]!r}, '
                        'but what is to be learned is an assistant\'s message at the end')
    return [i for i in turns if i == len(messages) - 1]


# ---- what a message must not do, and what a template does not write

# A chat that calls a tool, for what a template makes of it
PROBE = [
    {'role': 'user', 'content': 'ping'},
    {'role': 'assistant', 'content': '', 'tool_calls': [{'id': 'probe0001', 'type': 'function', 'function': {
        'name': 'probe_call', 'arguments': {'probe_key': 'probe_value'}}}]},
    {'role': 'tool', 'name': 'probe_call', 'tool_call_id': 'probe0001', 'content': 'probe_result'},
    {'role': 'assistant', 'content': 'pong'},
]
PROBE_TOOL = {'type': 'function', 'function': {'name': 'probe_tool', 'description': 'n', 'parameters': {
    'type': 'object', 'properties': {'n': {'type': 'string', 'description': 'n'}}}}}


@functools.lru_cache(maxsize=16)
def turn_marks(tokenizer, template):
    """A pattern of the tokens that begin or end turns of this template, and of those that end a text."""
    added = {token.content: token.special for token in tokenizer.backend.get_added_tokens_decoder().values()}
    ends = {tokenizer.backend.id_to_token(token) for token in tokenizer.stop_ids}
    ends |= {tokenizer.special.get('bos_token'), tokenizer.special.get('eos_token')}
    user, reply = PROBE[0], PROBE[3]
    asked = rendered(tokenizer, template, [user])
    # A reply may begin with <think>, and its calls with a token of their own: these are no frame. Where what
    # stands around a reply or a tool's result is one, it is a special token
    called = rendered(tokenizer, template, PROBE[:2])
    others = rendered(tokenizer, template, PROBE[:3]).removeprefix(called)
    for messages in ([{'role': 'system', 'content': 'ping'}, user], [user, reply, user]):
        others += rendered(tokenizer, template, messages, add_generation_prompt=True)
    marks = [token for token, is_special in added.items()
             if token in ends or token in asked or is_special and token in others]
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')


def rendered(tokenizer, template, messages, tools=None, add_generation_prompt=False):
    """A chat by a template, for a probe; '' where the template refuses it."""
    try:
        return apply(tokenizer, template, messages, tools, add_generation_prompt, {})
    except UserError:
        return ''


def spelled_marks(tokenizer, template, messages, tools):
    """The pattern of turn_marks where messages or tools spell such a token, else None."""
    marks = turn_marks(tokenizer, template)
    return marks if marks.search(str([messages, tools])) else None


def set_apart(marks, value):
    """Messages or tools with APART within every token that they spell."""
    if isinstance(value, str):
        return marks.sub(lambda match: match[0][:1] + APART + match[0][1:], value)
    if isinstance(value, list):
        return [set_apart(marks, item) for item in value]
    if isinstance(value, dict):
        return {set_apart(marks, key): set_apart(marks, item) for key, item in value.items()}
    return value


@functools.lru_cache(maxsize=32)
def left_out(tokenizer, template, with_tools):
    """What the template does not write: some of 'tools', 'tool calls', 'arguments' and 'tool results'."""
    tools = [PROBE_TOOL] if with_tools else None
    asked, called, whole = (rendered(tokenizer, template, PROBE[:n], tools) for n in (1, 2, 4))
    wanted = [('tools', 'probe_tool', asked if with_tools else ''), ('tool calls', 'probe_call', called),
              ('arguments', 'probe_value', called), ('arguments', 'probe_key', called),
              ('tool results', 'probe_result', whole)]
    # a text that is empty tells nothing: this template refuses such a chat, and says so of the row itself
    return {what for what, word, text in wanted if text and word not in text}


def refuse_what_is_left_out(tokenizer, template, messages, tools):
    """UserError where the template would drop a tool call of these messages, or what a tool returned."""
    kinds = []
    if any(message.get('tool_calls') for message in messages):
        kinds += ['tool calls', 'arguments']
    if any(message['role'] == 'tool' for message in messages):
        kinds.append('tool results')
    if not kinds:
        return
    dropped = left_out(tokenizer, template, tools is not None)
    for kind in kinds:
        if kind in dropped:
            raise UserError(f'chat template: that of this model does not write {kind}, which would be lost '
                            'without a word; put a chat_template.jinja that does beside the model, or write '
                            'them as text into "content"')


def remarks(tokenizer, messages, tools=None):
    """What is to be said of how a chat is written: some of the kinds of REMARKS."""
    template, tools = template_of(tokenizer, tools), normal_tools(tools)
    found = []
    if spelled_marks(tokenizer, template, messages, tools):
        found.append('chats that spell a turn token')
    if tools and 'tools' in left_out(tokenizer, template, True):
        found.append('chats whose tools are not written')
    return found


def encode(tokenizer, chats):
    """What `segments` returns for some chats -> list of Rendered.

    Every segment is encoded on its own and the ids are joined: the prompt's ids are those that the sampler
    will see.
    """
    first, later = [], []           # texts that begin a chat, and those that continue one
    for pieces, _ in chats:
        texts = [text for text, _ in pieces]
        first.append(texts[0])
        later += texts[1:]
    first = iter(tokenizer.encode_batch(first))
    later = iter(tokenizer.encode_batch(later, continued=True))
    rows = []
    for pieces, skipped in chats:
        row = Rendered([], [], skipped)
        for i, (_, is_target) in enumerate(pieces):
            ids = next(later if i else first)
            row.ids += ids
            row.mask += target_mask(tokenizer, ids) if is_target else [False] * len(ids)
        ends_in_target = row.mask and row.mask[-1]
        if ends_in_target and row.ids[-1] not in tokenizer.stop_ids and tokenizer.eos_id is not None:
            tokenizer.refuse_without_embedding([tokenizer.eos_id])
            row.ids.append(tokenizer.eos_id)
            row.mask.append(True)
            row.stop_added = True
        rows.append(row)
    return rows


def target_mask(tokenizer, ids):
    """All of a turn is learned but what a template writes after its stop token: a line end, say."""
    stops = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    end = stops[-1] + 1 if stops else len(ids)
    if tokenizer.decode(ids[end:]).strip():
        end = len(ids)
    return [i < end for i in range(len(ids))]


def template_of(tokenizer, tools=None):
    """The tokenizer's chat template. One that has none gets ours, to be saved with it; where there is no
    <|im_end|>, turns end with its end-of-text token. A chat begins with the token that begins a text, if
    there is one: base models (Llama, Gemma) were trained to see it."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer.id_of('<|im_end|>') is None and tokenizer.special.get('eos_token'):
            tokenizer.chat_template = CHAT_TEMPLATE.replace('<|im_end|>', tokenizer.special['eos_token'])
        if tokenizer.special.get('bos_token') not in (None, '<|im_start|>'):
            tokenizer.chat_template = '{{- bos_token }}' + tokenizer.chat_template
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template
        name = 'tool_use' if tools and 'tool_use' in named else 'default'
        return named.get(name) or next(iter(named.values()))
    return tokenizer.chat_template


def apply(tokenizer, template, messages, tools, add_generation_prompt, variables):
    """The text of a chat by a jinja template, with the variables that transformers gives to templates."""
    try:
        return compiled(template).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=add_generation_prompt,
            **tokenizer.special, **variables)
    except (jinja2.TemplateError, TypeError, LookupError, ValueError) as error:
        roles = ', '.join(message['role'] for message in messages) or 'nobody'
        reason = str(error).partition('\n')[0]
        raise UserError(f'chat template: {type(error).__name__}: {reason} (roles: {roles}); '
                        'give it the roles that it knows, or the model another template') from None


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text in some templates: it stays."""
    tags = {'generation'}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(['name:endgeneration'], drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """namespace() without names that begin with an underscore: a template of the hub is not trusted."""

    def __init__(*arguments, **names):
        self, given = arguments[0], dict(*arguments[1:], **names)
        for name in given:
            Namespace.refuse(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name, value):
        Namespace.refuse(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def refuse(name):
        if str(name).startswith('_'):
            raise jinja2.exceptions.SecurityError(f'the name {name!r} is not allowed')


@functools.lru_cache(maxsize=16)
def compiled(template):
    """A template in the sandbox, with the filters and functions that chat templates may use."""
    def fail(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def new_dict(*arguments, **named):      # instead of the type, which has more to get hold of
        return dict(*arguments, **named)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    extensions = [Generation, jinja2.ext.loopcontrols]
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=extensions)
    sandbox.filters['tojson'] = tojson
    sandbox.globals.update(raise_exception=fail, namespace=Namespace, dict=new_dict,
                           strftime_now=strftime_now)
    return sandbox.from_string(template)


@functools.lru_cache(maxsize=16)
def lacks_generation_prompt(tokenizer, template):
    """Whether a reply begins with words of the template (a role) that add_generation_prompt does not write,
    so that a model would have to sample them. Where replies follow the question directly ([INST] ... [/INST])
    all is well."""
    user, reply = {'role': 'user', 'content': 'ping'}, {'role': 'assistant', 'content': 'pong'}
    try:
        prompt = apply(tokenizer, template, [user], None, True, {})
        plain = apply(tokenizer, template, [user], None, False, {})
        full = apply(tokenizer, template, [user, reply], None, False, {})
    except UserError:
        return False        # too particular for this probe: the prefix check remains
    if prompt != plain or not full.startswith(plain):
        return False
    opening = full[len(plain):].partition('pong')[0]
    return bool(opening.strip())


def normal_messages(messages, knows_developer):
    """Checked copies: content is text, tool calls are {'type', 'function': {'name', 'arguments': object}}; a
    developer is a system to a template that does not know the role (many would drop it without a word)."""
    if not isinstance(messages, list) or not messages:
        raise UserError('messages: expected a list of at least one {"role": ..., "content": ...}')
    normal = []
    for number, message in enumerate(messages):
        where = f'messages[{number}]'
        if not isinstance(message, dict) or message.get('role') not in ROLES:
            raise UserError(f'{where}: needs a role among {", ".join(ROLES)}, got {str(message)[:60]}')
        message = dict(message, content=plain_text(message.get('content'), where))
        if message['role'] == 'developer' and not knows_developer:
            message['role'] = 'system'
        if message.get('tool_calls'):
            message['tool_calls'] = [normal_call(call, f'{where}.tool_calls[{i}]')
                                     for i, call in enumerate(message['tool_calls'])]
        normal.append(message)
    return normal


def plain_text(content, where):
    """A string of a content that may be missing or a list of {'type': 'text'} parts."""
    if isinstance(content, list):
        if all(isinstance(part, dict) and part.get('type') == 'text' for part in content):
            content = ''.join(part['text'] for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(f'{where}.content: expected text, got {str(content)[:60]}')
    return content or ''


def normal_call(call, where):
    """A tool call, bare or with its function inside -> {'type', 'function': {'name', 'arguments': dict}}."""
    function = call.get('function', call) if isinstance(call, dict) else {}
    name, arguments = function.get('name'), function.get('arguments', {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise UserError(f'{where}: arguments are not a JSON object: {arguments[:60]!r}') from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise UserError(f'{where}: expected a name and arguments (an object), got {str(call)[:80]}')
    normal = {'type': 'function', 'function': {'name': name, 'arguments': arguments}}
    return {'id': call['id'], **normal} if call.get('id') else normal


def normal_tools(tools):
    """JSON schemas, as a list or as text -> [{'type': 'function', 'function': {...}}]; None for no tools."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise UserError(f'tools: not a JSON list: {tools[:60]!r}') from None
    if not tools:
        return None
    functions = [tool.get('function', tool) if isinstance(tool, dict) else None for tool in tools]
    for number, function in enumerate(functions):
        if not isinstance(function, dict) or not isinstance(function.get('name'), str):
            raise UserError(f'tools[{number}]: expected {{"function": {{"name": ..., "parameters": ...}}}}')
    return [{'type': 'function', 'function': function} for function in functions]


def parse_tool_calls(text):
    """What a model wrote -> [{'name': str, 'arguments': dict}, ...], [] where it calls nothing.

    Reads <tool_call>{json}</tool_call> (ours, Hermes, Qwen), [TOOL_CALLS] (Mistral), a bare JSON object with
    "parameters" (Llama), and call:name{key:<escape>text<escape>} (FunctionGemma). ValueError says what is
    wrong; nothing is evaluated.
    """
    if '<tool_call>' in text or '</tool_call>' in text:
        blocks = re.findall(r'<tool_call>(.*?)</tool_call>', text, re.DOTALL)
        if not len(blocks) == text.count('<tool_call>') == text.count('</tool_call>'):
            raise ValueError('a <tool_call> without its </tool_call>, or the reverse')
        values = [json_value(block) for block in blocks]
    elif '<start_function_call>' in text:
        values = [gemma_call(block) for block in text.split('<start_function_call>')[1:]]
    elif '[TOOL_CALLS]' in text:
        value = json_value(text.partition('[TOOL_CALLS]')[2].strip().removesuffix('</s>'))
        values = value if isinstance(value, list) else [value]
    elif re.match(r'\s*(<\|python_tag\|>)?\s*\{\s*"(name|type)"', text):
        values = [json_value(re.sub(r'<\|\w+\|>', '', text))]
    else:
        return []
    return [parsed_call(value) for value in values]


def parsed_call(call):
    """A call as a model wrote it -> {'name': str, 'arguments': dict}; ValueError where it is none."""
    function = call.get('function', call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        function = {}
    name = function.get('name')
    arguments = function.get('arguments', function.get('parameters'))
    if isinstance(arguments, str):
        arguments = json_value(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError('a call without a name, or whose arguments are not an object')
    return {'name': name, 'arguments': arguments}


def json_value(text):
    """json.loads whose every failure, nesting too deep for the parser included, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError('JSON nested too deeply') from None


def gemma_call(block):
    """call:name{key:<escape>text<escape>,n:1}<end_function_call>: texts are between <escape>, keys bare."""
    match = re.match(r'call:([\w.-]+)(\{.*\})<end_function_call>', block, re.DOTALL)
    if not match:
        raise ValueError('expected call:name{...}<end_function_call>')
    parts = match[2].split('<escape>')
    parts[0::2] = [re.sub(r'([{,]\s*)([^\s{},:"\[\]]+)\s*:', r'\1"\2":', part) for part in parts[0::2]]
    parts[1::2] = [json.dumps(part) for part in parts[1::2]]
    return {'name': match[1], 'arguments': json_value(''.join(parts))}
