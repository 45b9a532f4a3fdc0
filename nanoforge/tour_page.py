"""report.html of scripts/tour.py: one file that shows what each stage of training changed.

It is made from what the stages wrote (log.jsonl, rollouts.jsonl, validate/) and from the answers and scores
in tour.json; nothing is computed again.
"""
import json
from html import escape
from pathlib import Path

from data.completions import read_completions
from nanoforge import svg
from nanoforge.checkpoint import write_text
from nanoforge.pages import element, html_episode, html_group, html_page, html_story, html_view
from nanoforge.plots import BLUE, GREEN, ORANGE, read_log

# stage: what it is for, what it begins with, the measure that it is to change
STAGES = {
    '1-pretrain': (
        'A transformer with random weights learns to go on with texts: facts about twenty people, sums '
        'worked out, ways through grids. It has read no question with its answer, and so it answers none.',
        'text'),
    '2-sft': (
        'Chats teach it to answer: questions about people, sums, the two roles of the team. Its teachers '
        'have faults on purpose: they answer in a word or in a sentence whatever was asked for, forget to '
        'carry in most sums, and stop one move before the goal. It learns these, too.', 'facts'),
    '3-dpo': (
        'Pairs of answers, the same fact in the form that was asked for and in the other one: the policy is '
        'moved from the second to the first, measured from the model that the stage began with.', 'form'),
    '4-grpo': (
        'Eight answers are drawn to each sum, and the right ones are made likelier than the wrong ones. '
        'Nobody shows a right answer: it is found among those that the model gives.', 'sums'),
    '5-team': (
        'One model plays two agents on a grid. The tool agent proposes a way, which is tried out; the plan '
        'agent sees the result and walks, three turns at most. At every turn eight candidates of the acting '
        'agent are compared (AT-GRPO), and the best is carried out.', 'grids'),
}
CURVES = {      # panels of a stage: {key of its log: name of the curve}
    '1-pretrain': [{'loss': 'training loss', 'eval_loss': 'held-out loss'}],
    '2-sft': [{'loss': 'training loss', 'eval_loss': 'held-out loss'}],
    '3-dpo': [{'rewards/accuracies': 'pairs in order, training',
               'success_rate': 'answers in the form, held out'}],
    '4-grpo': [{'reward': 'reward, training', 'eval_accuracy': 'right sums, held out, likeliest answer',
                'eval_accuracy_sampled': 'right sums, held out, drawn'}],
    '5-team': [{'success_rate': 'solved, training', 'validation/success_rate': 'solved, held out, drawn',
                'validation/greedy_success_rate': 'solved, held out, likeliest answers'}],
}
MEASURES = {        # name in tour.json: heading of its column
    'text': 'held-out text, nats per token',
    'facts': 'facts known',
    'form': 'answers in the form asked for',
    'sums': 'sums right',
    'grids': 'grids solved by the team',
}
FILES = {'loss.png': 'curves', 'margins.png': 'margins', 'reward.png': 'curves', 'rollouts.html': 'rollouts',
         'episodes.html': 'episodes'}       # that stages leave beside their logs
COLOURS = (BLUE, ORANGE, GREEN)
INTRODUCTION = (
    'One model, from random weights to a team of two agents: every stage begins with the checkpoint that the '
    'one before it left. All that it reads is generated: a small world of names, sums and grids. Of anything '
    'else it knows nothing.')
MEANING = (
    'To each of {count} held-out problems of a kind one answer is drawn at temperature 1, with the same '
    'random numbers after every stage; by chance alone a share moves by about {noise} points. Facts: no '
    'question about them occurs in training, only statements; they count in whatever form. Form: a word or a '
    'sentence, by wordings that do not occur, whatever the fact; half of it is chance, as several words pass '
    'for a sentence. Sums: operands and wordings occur in no training text. '
    'Grids: no goal with its walls does. Of the text lower is better: guessing would be {chance:.2f}. What a '
    'stage is for is in yellow; what it spoils besides is there to be seen.')
REPLAY = '''<script>
function show(box){const at=box.querySelector('input').value;
for(const frame of box.querySelectorAll('.frame'))frame.hidden=frame.dataset.n!=at}
function play(box){const at=box.querySelector('input');at.value=0;show(box);
const timer=setInterval(()=>{at.value++;show(box);if(at.value==at.max)clearInterval(timer)},900)}
</script>'''


def tour_page(path, facts, stages, examples, count, chance):
    """Writes the page.

    facts     what is said of the run, texts
    stages    those that have ended, [{'name', 'title', 'command', 'seconds', 'cpu_seconds', 'scores',
              'answers', 'log': path of log.jsonl, 'output': file of what it printed}]
    examples  the prompts of the answers: [{'name', 'asked', 'wanted', and for some 'view', a board}]
    count     problems behind a score
    chance    nats per token of a model that guesses
    """
    path = Path(path)
    noise = round(100 * (0.25 / count) ** 0.5)
    parts = [
        f'<p class=facts>{escape(" · ".join(facts))}</p>',
        element('p', INTRODUCTION),
        element('h2', 'What each stage changed'), html_scores(stages),
        element('p', MEANING.format(count=count, noise=noise, chance=chance)),
        element('h2', 'The same prompts after every stage'), html_answers(stages, examples),
        *(html_stage(stage, path.parent) for stage in stages),
    ]
    write_text(path, html_page('From nothing to a team', '\n'.join(parts)))


def html_scores(stages):
    """Stages and their scores; in yellow what a stage is for."""
    heads = ''.join(f'<th class=n>{escape(text)}</th>' for text in (*MEASURES.values(), 'minutes'))
    rows = []
    for stage in stages:
        cells = [f'<td>{escape(stage["title"])}</td>']
        for measure in MEASURES:
            value = stage['scores'][measure]
            marked = ' executed' if measure == STAGES[stage['name']][1] else ''
            text = f'{value:.2f}' if measure == 'text' else f'{value:.0%}'
            cells.append(f'<td class="n{marked}">{text}</td>')
        rows.append(f'<tr>{"".join(cells)}<td class=n>{stage["seconds"] / 60:.1f}</td></tr>')
    return f'<div class=wide><table><tr><th>after</th>{heads}</tr>{"".join(rows)}</table></div>'


def html_answers(stages, examples):
    """The likeliest answer to each prompt after every stage; in yellow where it is another than before."""
    rows = []
    for example in examples:
        asked = f'<b>{escape(example["name"])}:</b> {escape(example["asked"])}'
        wanted = f'<span class=facts>right: {escape(example["wanted"])}</span>'
        drawn = html_view(example['view']) if 'view' in example else ''
        rows.append(f'<tr><td colspan=3>{drawn}{asked}<br>{wanted}</td></tr>')
        before = None
        for stage in stages:
            answer = stage['answers'][example['name']]
            marked = ' class=executed' if before not in (None, answer['text']) else ''
            verdict = '<b class=good>right</b>' if answer['right'] else '<span class=bad>wrong</span>'
            text = shortened(answer['text'], 160) or '(nothing)'
            rows.append(f'<tr><td>{escape(stage["title"])}</td><td{marked}><code>{escape(text)}</code></td>'
                        f'<td>{verdict}</td></tr>')
            before = answer['text']
    return f'<table class=answers>{"".join(rows)}</table>'


def shortened(text, length):
    return text if len(text) <= length else text[:length - 3] + '...'


def html_stage(stage, folder):
    name, log = stage['name'], Path(stage['log'])
    series, header = read_log(log) if log.exists() else ({}, {})
    curves = []
    for panel in CURVES[name]:
        named = {label: series[key] for key, label in panel.items() if key in series}
        curves.append(svg.curves(named, dict(zip(named, COLOURS))))
    took = (f'{stage["seconds"] / 60:.1f} minutes, {stage["cpu_seconds"] / 60:.1f} of processor time. '
            f'{header.get("machine", "")}')
    files = {stage['output']: 'what it printed'}
    files.update((relative(log.with_name(file), folder), text) for file, text in FILES.items()
                 if log.with_name(file).exists())
    links = ' · '.join(f'<a href="{escape(file)}">{escape(text)}</a>' for file, text in files.items())
    more = {'4-grpo': html_rollout, '5-team': html_replay}.get(name)
    return '\n'.join([
        element('h2', f'{name[0]}. {stage["title"].capitalize()}'), element('p', STAGES[name][0]), *curves,
        more(log.parent) if more else '', element('pre', stage['command']),
        f'<p class=facts>{escape(took)}<br>{links}</p>'])


def relative(path, folder):
    return Path(path).relative_to(folder).as_posix()


def html_rollout(folder):
    """A prompt of the first rollout of which some answers were right and some wrong."""
    path = folder / 'rollouts.jsonl'
    groups = {}
    for completion in read_completions(path) if path.exists() else ():
        if completion.step == 0:
            groups.setdefault((completion.group, completion.agent, completion.turn), []).append(completion)
    mixed = [key for key, members in groups.items() if len({member.reward for member in members}) > 1]
    if not mixed:
        return ''
    members = groups[mixed[0]]
    strongest = max(abs(member.advantage) for member in members)
    opened = html_group(mixed[0], members, strongest, '').replace('<details', '<details open', 1)
    return element('p', 'Answers to one sum at the first step: green ones are made likelier, red ones less '
                        'likely.') + opened


def html_replay(folder):
    """A held-out grid that the team did not solve before its training, and its episode after it."""
    steps = sorted(int(path.stem.removeprefix('step-')) for path in folder.glob('validate/step-*.jsonl'))
    if len(steps) < 2:
        return ''
    first, last = (read_episodes(folder / 'validate' / f'step-{step}.jsonl')
                   for step in (steps[0], steps[-1]))

    def interest(key):      # solved now and not before, in several steps
        solved = last[key]['success']
        return solved and not first[key]['success'], solved, len(last[key]['turns'])

    key = max(last, key=interest)
    before, after = first[key], last[key]
    end = 'solved' if before['success'] else 'not solved'
    return (element('p', f'An episode to replay, held-out problem {after["episode"]}:') + html_frames(after)
            + f'<div class=episodes>{html_episode(after)}</div>'
            + element('p', f'The same grid before the training, {end}:') + html_story(before) + REPLAY)


def html_frames(episode):
    """One frame for every answer that was carried out; a slider and a button go through them."""
    views = [turn['view'] for turn in episode['turns']] + [episode['end']]
    frames = [(views[0], 'the start')]
    for turn, view in zip(episode['turns'], views[1:]):
        answer = turn['candidates'][turn['executed']]
        said = f'{answer["text"]} ({answer["note"]})'
        frames.append((view, f'turn {turn["turn"] + 1}, {turn["agent"]}: {said}'))
    drawn = ''
    for i, (view, text) in enumerate(frames):
        hidden = ' hidden' if i else ''
        drawn += f'<div class=frame data-n={i}{hidden}>{html_view(view)}{element("p", text)}</div>'
    return (f'<div class=replay>{drawn}<button onclick="play(this.parentNode)">replay</button> '
            f'<input type=range aria-label="answer" min=0 max={len(frames) - 1} value=0 '
            'oninput="show(this.parentNode)"></div>')


def read_episodes(path):
    """{(greedy or sampled, number): episode} of a validation."""
    episodes = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    return {(episode['manner'], episode['episode']): episode for episode in episodes}
