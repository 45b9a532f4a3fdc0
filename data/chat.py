"""Messages -> token ids and a loss mask, once, for every script; and tool calls read back from text.

A chat is a list of {'role', 'content', ...} with roles system, developer, user, assistant, tool; an assistant may
have 'tool_calls', arguments as an object or as a JSON string. The model's own template renders it, ours (CHAT_TEMPLATE)
where it has none. What an assistant said is found by rendering the chat up to there: that text must begin the whole.
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

# ChatML: roles between <|im_start|> and <|im_end|>, tools as JSON schemas in the system turn, one <tool_call> per call.
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
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
'''


@dataclass
class Rendered:
    """ids of one chat and, for each, whether it is a target. `skipped`: assistant turns that are context only because
    the template rewrites them later in the chat. `stop_added`: the template ends its turns without a stop token, so the
    tokenizer's was put at the end."""
    ids: list
    mask: list
    skipped: int = 0
    stop_added: bool = False


def render(tokenizer, messages, tools=None, loss_on='completion', add_generation_prompt=False, **variables):
    """One chat -> Rendered. loss_on: 'completion' (the last message, an assistant's), 'assistant' (all of its turns) or
    'all'; the stop token is a target, what a template writes behind it is not. add_generation_prompt ends the chat
    where the model is to speak: then no message is a completion. variables go to the template (enable_thinking=False).
    UserError: a chat or a template that cannot be rendered so."""
    return encode(tokenizer, [segments(tokenizer, messages, tools, loss_on, add_generation_prompt, **variables)])[0]


def prompt_ids(tokenizer, messages, tools=None, **variables):
    """The ids after which the model is to answer these messages."""
    return render(tokenizer, messages, tools, 'completion', True, **variables).ids


def render_rows(tokenizer, messages, tools=None, loss_on='completion', **variables):
    """The training rows of one chat: one; but with loss_on='assistant' and a template that rewrites earlier turns
    (drops their <think>, say) a row for every turn, each as the model sees it when it speaks."""
    whole = render(tokenizer, messages, tools, loss_on, **variables)
    if not whole.skipped:
        return [whole]
    turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
    return [render(tokenizer, messages[:i + 1], tools, 'completion', **variables) for i in turns]


def segments(tokenizer, messages, tools=None, loss_on='completion', add_generation_prompt=False, **variables):
    """The text of a chat cut where the loss mask changes: ([(text, is_target), ...], skipped turns). Apart from
    `encode`, so that a data set is encoded in large batches."""
    template = template_of(tokenizer, tools)
    messages, tools = normal_messages(messages, 'developer' in template), normal_tools(tools)

    def text_until(end, prompt):
        return apply(tokenizer, template, messages[:end], tools, prompt, variables)

    full = text_until(len(messages), add_generation_prompt)
    if loss_on == 'all':
        said = text_until(len(messages), False)
        return [(said, True), (full[len(said):], False)], 0
    turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
    if loss_on == 'completion':
        if not add_generation_prompt and turns[-1:] != [len(messages) - 1]:
            raise UserError(f'messages: the last one is from {messages[-1]["role"]!r}, but what is to be learned is an '
                            "assistant's message at the end")
        turns = [] if add_generation_prompt else turns[-1:]
    elif loss_on != 'assistant':
        raise UserError(f'loss_on={loss_on!r}: one of completion, assistant, all')
    if (add_generation_prompt or turns) and lacks_generation_prompt(tokenizer, template):
        raise UserError('chat template: it has no generation prompt, the model would have to begin its own turn; end '
                        'the template with {% if add_generation_prompt %} and the words that open a reply')
    pieces, at, skipped = [], 0, 0
    for i in turns:
        start, end = text_until(i, True), text_until(i + 1, False) if i + 1 < len(messages) else full
        if not (full.startswith(end) and end.startswith(start) and at <= len(start) < len(end)):
            skipped += 1
            continue
        pieces += [(full[at:len(start)], False), (full[len(start):len(end)], True)]
        at = len(end)
    if turns and skipped == len(turns):
        raise UserError('chat template: the prompt is not the beginning of the whole chat, so the completion cannot be '
                        f'told apart (one has {start[-40:]!r} where the other has {full[:len(start)][-40:]!r}); use a '
                        'template that writes a turn in the same way before and after it is answered')
    return pieces + [(full[at:], False)], skipped


def encode(tokenizer, chats):
    """What `segments` returns for some chats -> list of Rendered. Every segment is encoded on its own and the ids are
    joined: the prompt's ids are those that the sampler will see."""
    first = iter(tokenizer.encode_batch([pieces[0][0] for pieces, _ in chats]))
    later = iter(tokenizer.encode_batch([text for pieces, _ in chats for text, _ in pieces[1:]], continued=True))
    rows = []
    for pieces, skipped in chats:
        row = Rendered([], [], skipped)
        for i, (_, is_target) in enumerate(pieces):
            ids = next(later if i else first)
            targets = [is_target] * len(ids)
            stops = [at for at, token in enumerate(ids) if token in tokenizer.stop_ids] if is_target else []
            if stops and not tokenizer.decode(ids[stops[-1] + 1:]).strip():     # the line end behind <|im_end|>
                targets[stops[-1] + 1:] = [False] * (len(ids) - stops[-1] - 1)
            row.ids += ids
            row.mask += targets
        if row.mask and row.mask[-1] and row.ids[-1] not in tokenizer.stop_ids and tokenizer.eos_id is not None:
            row.ids.append(tokenizer.eos_id)
            row.mask.append(True)
            row.stop_added = True
        rows.append(row)
    return rows


def template_of(tokenizer, tools=None):
    """The tokenizer's chat template. One that has none gets ours, to be saved with it; where there is no <|im_end|>,
    turns end with its end-of-text token."""
    if tokenizer.chat_template is None:
        end = '<|im_end|>' if tokenizer.id_of('<|im_end|>') is not None else tokenizer.special.get('eos_token')
        tokenizer.chat_template = CHAT_TEMPLATE.replace('<|im_end|>', end or '<|im_end|>')
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template
        name = 'tool_use' if tools and 'tool_use' in named else 'default'
        return named.get(name) or next(iter(named.values()))
    return tokenizer.chat_template


def apply(tokenizer, template, messages, tools, add_generation_prompt, variables):
    """The text of a chat by a jinja template, with the variables that transformers gives to templates."""
    try:
        return compiled(template).render(messages=messages, tools=tools, documents=None,
                                         add_generation_prompt=add_generation_prompt, **tokenizer.special, **variables)
    except (jinja2.TemplateError, TypeError, LookupError, ValueError) as error:
        roles = ', '.join(message['role'] for message in messages) or 'nobody'
        raise UserError(f'chat template: {type(error).__name__}: {str(error).partition(chr(10))[0]} (roles: {roles}); '
                        'give it the roles that it knows, or the model another template') from None


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says in some templates: rendered as it is."""
    tags = {'generation'}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(['name:endgeneration'], drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """namespace() without names that begin with an underscore: a template from a hub is nobody's trusted code."""

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
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters['tojson'] = tojson
    sandbox.globals.update(raise_exception=fail, namespace=Namespace,
                           dict=lambda *given, **named: dict(*given, **named),      # the type itself has more to grab
                           strftime_now=lambda form: datetime.datetime.now().strftime(form))
    return sandbox.from_string(template)


@functools.lru_cache(maxsize=16)
def lacks_generation_prompt(tokenizer, template):
    """Whether a reply begins with words of the template (a role) that add_generation_prompt does not write, so that a
    model would have to sample them. Where replies follow the question directly ([INST] ... [/INST]) all is well."""
    user, reply = {'role': 'user', 'content': 'ping'}, {'role': 'assistant', 'content': 'pong'}
    try:
        prompt, plain, full = (apply(tokenizer, template, messages, None, prompted, {})
                               for messages, prompted in (([user], True), ([user], False), ([user, reply], False)))
    except UserError:
        return False                                    # too particular for this probe: the prefix check remains
    return prompt == plain and full.startswith(plain) and bool(full[len(plain):].partition('pong')[0].strip())


def normal_messages(messages, knows_developer):
    """Checked copies: content is text, tool calls are {'type', 'function': {'name', 'arguments': object}}; a developer
    is a system to a template that does not know the role (many would drop it without a word)."""
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
    """A string of what may be missing (where an assistant only calls tools) or a list of {'type': 'text'} parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get('type') == 'text' for part in content):
        content = ''.join(part['text'] for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(f'{where}.content: expected text, got {str(content)[:60]}')
    return content or ''


def normal_call(call, where):
    """A tool call, its function inside or bare -> {'type': 'function', 'function': {'name', 'arguments': dict}}."""
    function = call.get('function', call) if isinstance(call, dict) else {}
    name, arguments = function.get('name'), function.get('arguments', {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            raise UserError(f'{where}: arguments are not a JSON object: {arguments[:60]!r}') from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise UserError(f'{where}: expected a name and arguments (an object), got {str(call)[:80]}')
    kept = {'id': call['id']} if call.get('id') else {}
    return {**kept, 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


def normal_tools(tools):
    """A list of JSON schemas, or one as a string -> [{'type': 'function', 'function': {...}}]; None for no tools."""
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
    """What a model wrote -> [{'name': str, 'arguments': dict}, ...], [] where it calls nothing. Reads <tool_call>{json}
    </tool_call> (ours, Hermes, Qwen), [TOOL_CALLS] (Mistral), a bare JSON object with "parameters" (Llama), and
    call:name{key:<escape>text<escape>} (FunctionGemma). ValueError says what is wrong; nothing is evaluated."""
    if '<tool_call>' in text or '</tool_call>' in text:
        blocks = re.findall(r'<tool_call>(.*?)</tool_call>', text, re.DOTALL)
        if not len(blocks) == text.count('<tool_call>') == text.count('</tool_call>'):
            raise ValueError('a <tool_call> without its </tool_call>, or the reverse')
        found = [json_value(block) for block in blocks]
    elif '<start_function_call>' in text:
        found = [gemma_call(block) for block in re.split('<start_function_call>', text)[1:]]
    elif '[TOOL_CALLS]' in text:
        found = json_value(re.sub('</s>$', '', text.partition('[TOOL_CALLS]')[2].strip()))
        found = found if isinstance(found, list) else [found]
    elif re.match(r'\s*(<\|python_tag\|>)?\s*\{\s*"(name|type)"', text):
        found = [json_value(re.sub(r'<\|\w+\|>', '', text))]
    else:
        return []
    calls = []
    for call in found:
        call = call.get('function', call) if isinstance(call, dict) else {}
        call = call if isinstance(call, dict) else {}
        name, arguments = call.get('name'), call.get('arguments', call.get('parameters'))
        arguments = json_value(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError('a call without a name, or whose arguments are not an object')
        calls.append({'name': name, 'arguments': arguments})
    return calls


def json_value(text):
    """json.loads whose every failure, nesting too deep for the parser included, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError('JSON nested too deeply') from None


def gemma_call(block):
    """call:name{key:<escape>text<escape>,n:1}<end_function_call>: texts stand between <escape>, keys are bare."""
    match = re.match(r'call:([\w.-]+)(\{.*\})<end_function_call>', block, re.DOTALL)
    if not match:
        raise ValueError('expected call:name{...}<end_function_call>')
    parts = match[2].split('<escape>')
    parts[0::2] = [re.sub(r'([{,]\s*)([^\s{},:"\[\]]+)\s*:', r'\1"\2":', part) for part in parts[0::2]]
    parts[1::2] = [json.dumps(part) for part in parts[1::2]]
    return {'name': match[1], 'arguments': json_value(''.join(parts))}
