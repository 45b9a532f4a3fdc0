"""Pages that people read, each one file that needs no other; all that a model wrote is escaped.

    rollouts_page       rollouts.html of train_rl.py: samples, the likelier and the less likely ones
    episodes_page       episodes.html of train_agents.py: trees of turns
    explain_group       the completions of a prompt, in words
    explain_no_signal   a run from which there was nothing to learn, in words

They are made from what a run wrote down, so a resumed run's are whole.
"""
import json
from html import escape
from pathlib import Path

from configurator import flatten
from data.completions import read_completions
from data.rewards import short_names
from nanoforge import svg
from nanoforge.checkpoint import write_text
from nanoforge.plots import BLUE, GREEN, ORANGE, PURPLE, read_log

# ---- what all pages share ---------------------------------------------------------------------------------

# light, and dark where the reader's system is; names of colours stand in one place
STYLE = '''
:root{color-scheme:light dark;--text:#222;--faint:#666;--line:#e2e2e2;--edge:#999;--panel:#f6f6f6;
--marked:#fff3c4;--good:#1a7f37;--bad:#b3261e;--wall:#6b6b6b;--box:#b5793a;--player:#3b6fb6;--goal:#d9622b}
@media(prefers-color-scheme:dark){:root{--text:#dcdcdc;--faint:#9a9a9a;--line:#3a3a3a;--edge:#777;
--panel:#222;--marked:#4a3f12;--good:#57c878;--bad:#ef8078;--wall:#8a8a8a}body{background:#161616}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--text);max-width:66rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;font-size:1.2rem}img{max-width:100%;background:#fff}
summary{cursor:pointer;padding:.2rem 0}.facts{color:var(--faint);font-size:.85rem}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:.2rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{border-bottom:2px solid var(--edge)}.n{text-align:right}td.n{white-space:nowrap}
figure{display:inline-block;vertical-align:top;margin:.5rem 1.5rem .5rem 0;max-width:100%}
figcaption{font-size:.85rem}
svg{max-width:100%}svg text{fill:var(--faint);font-size:11px}.grid{stroke:var(--line)}
.board{flex:none}.floor{fill:var(--panel);stroke:var(--line)}.wall{fill:var(--wall);stroke:var(--wall)}
.box{fill:var(--box)}.player{fill:var(--player)}.goal{fill:none;stroke:var(--goal);stroke-width:3}
.example{border-left:4px solid #d9622b;padding:.2rem 1rem;margin:1rem 0;background:var(--panel)}
.example.correct{border-color:#4a9b6e}
.example b{display:inline-block;width:6rem;color:var(--faint);font-weight:normal}
.example div{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0}
.step>summary{font-weight:600;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
.group{margin:.3rem 0 .3rem 1rem}.group>summary{overflow-wrap:anywhere}
.question{color:var(--faint);white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 .4rem}
.cells{display:inline-flex;gap:2px;vertical-align:middle;margin-right:.6rem}
.cells i,.key i{width:.8rem;height:.8rem;border-radius:2px;display:block}
.key i{display:inline-block;margin:0 .3rem 0 1rem;vertical-align:-1px}
.sample{display:grid;grid-template-columns:13rem 1fr;gap:.8rem;padding:.25rem .5rem;margin:2px 0;
border-radius:4px}
.sample code{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.4 ui-monospace,monospace}
.sample i{color:var(--faint)}
.episodes details{border:1px solid var(--line);border-radius:6px;margin:.5em 0;padding:.4em .8em}
.turn{display:flex;gap:1.4em;align-items:flex-start;margin:.8em 0;flex-wrap:wrap}
.turn table{flex:1;min-width:min(24em,100%);margin:0}.turn td:first-child{overflow-wrap:anywhere}
.executed{background:var(--marked);font-weight:600}
.story{display:flex;gap:.8em;align-items:center;flex-wrap:wrap;margin:.6em 0}
.story div{max-width:12em;text-align:center;font-size:.8rem;color:var(--faint);overflow-wrap:anywhere}
pre{font:13px/1.4 ui-monospace,monospace;padding:.5em .7em;background:var(--panel);
border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere}
.episodes pre{font:15px/1.2 ui-monospace,monospace;margin:0}
.answers td:first-child{white-space:nowrap}.answers td[colspan]{white-space:normal;padding-top:1rem}
.answers code{overflow-wrap:anywhere;font:13px/1.4 ui-monospace,monospace}
.good{color:var(--good)}.bad{color:var(--bad)}
@media(max-width:40rem){.sample{grid-template-columns:1fr;gap:.2rem}td,th{padding:.2rem .4rem}}'''
WORDS = ('', 'what it means', 'tool', 'most often instead', 'answer', 'outcome')     # columns without numbers


def html_page(title, body):
    title = escape(title)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
            f'<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n')


def html_facts(folder, header):
    """What a run is, by the header of its log.jsonl and the settings of its run_config.json."""
    known = [f'{key} {value}' for key, value in header.items() if isinstance(value, (str, int, float))]
    facts = f'<p class=facts>{escape(" · ".join(known))}</p>' if known else ''
    path = Path(folder, 'run_config.json')
    if not path.exists():
        return facts
    config = json.loads(path.read_text(encoding='utf-8'))['config']
    rows = [(name, value) for name, value in flatten(config) if value not in (None, '', [], {})]
    lines = ''.join(f'<tr>{element("td", name)}{element("td", str(value))}</tr>' for name, value in rows)
    table = f'<div class=wide><table>{lines}</table></div>'
    return f'{facts}<details><summary>all settings</summary>{table}</details>'


def element(tag, text):
    return f'<{tag}>{escape(text)}</{tag}>'


def html_table(headers, rows, executed=None):
    """A table of texts, numbers to the right. executed: number of the row that stands out."""
    sides = ['' if header in WORDS else ' class=n' for header in headers]

    def line(tag, cells):
        return ''.join(f'<{tag}{side}>{escape(text)}</{tag}>' for side, text in zip(sides, cells))

    marks = [' class=executed' if i == executed else '' for i in range(len(rows))]
    body = ''.join(f'<tr{mark}>{line("td", row)}</tr>' for mark, row in zip(marks, rows))
    return f'<div class=wide><table><tr>{line("th", headers)}</tr>{body}</table></div>'


# ---- rollouts of reinforcement learning -------------------------------------------------------------------

STEPS_SHOWN = 12            # spread over the run, the first and the last among them
GROUPS_SHOWN = 12           # of each step
TEXT_SHOWN = 2000           # characters of a completion


def rollouts_page(jsonl_path, html_path, title, judge=''):
    """rollouts.jsonl as a page: of a long run some steps are shown, of a step some groups: the completions of
    a prompt. judge: 'critic' or 'teacher', where they are not compared with each other."""
    by_step = {}
    for completion in read_completions(jsonl_path):
        by_step.setdefault(completion.step, []).append(completion)
    steps = sorted(by_step)
    if not steps:
        return
    spacing = (len(steps) - 1) / max(1, STEPS_SHOWN - 1)
    shown = sorted({steps[round(i * spacing)] for i in range(STEPS_SHOWN)})
    note = (f'{len(shown)} of {len(steps)} rollouts, up to {GROUPS_SHOWN} prompts of each; '
            f'all are in {Path(jsonl_path).name}.')
    if judge:
        note += f" An advantage is the mean over a completion's tokens, each by the {judge}."
    grey = 'unscored' if judge else 'nothing to learn (equal rewards, or unscored)'
    key = ''.join(cell(advantage, 1) + meaning for advantage, meaning in
                  ((1, 'made likelier'), (-1, 'made less likely'), (0, grey)))
    prompt = by_step[shown[0]][0].prompt
    asked = f'<p>The first prompt, as the model read it:</p><div class=question>{escape(prompt)}</div>'
    folder, log = Path(html_path).parent, Path(html_path).with_name('log.jsonl')
    series, header = read_log(log) if log.exists() else ({}, {})
    parts = [html_step(step, by_step[step], step == shown[-1], judge) for step in shown]
    body = '\n'.join([html_facts(folder, header),
                      svg.curves(series, {'reward': BLUE, 'eval_accuracy': ORANGE}),
                      svg.curves(series, {'completions/mean_length': PURPLE}),
                      element('p', note), f'<p class=key>{key}</p>', asked if prompt else '', *parts])
    write_text(html_path, html_page(title, body))


def shade(advantage, strongest):
    """The colour of an advantage: green where a sample is made likelier, red where less likely, else grey."""
    if not advantage:
        return 'hsl(0 0% 50%/.15)'
    hue = 140 if advantage > 0 else 8
    share = min(1.0, abs(advantage) / strongest) if strongest else 0.0
    return f'hsl({hue} 60% 45%/{0.12 + 0.5 * share:.2f})'       # on light and dark


def cell(advantage, strongest):
    """A small square in that colour."""
    return f'<i style="background:{shade(advantage, strongest)}"></i>'


def html_step(step, completions, is_open, judge):
    groups = {}
    for completion in completions:
        groups.setdefault((completion.group, completion.agent, completion.turn), []).append(completion)
    rewards = rewards_of(completions)
    mean_reward = sum(rewards) / len(rewards) if rewards else float('nan')
    mean_length = sum(completion.length for completion in completions) / len(completions)
    facts = f'step {step}: reward {mean_reward:.3f}, {len(groups)} {"prompts" if judge else "groups"}'
    if not judge and (equal := sum(map(has_equal_rewards, groups.values()))):
        facts += f' ({equal} with equal rewards)'
    facts += f', {mean_length:.0f} tokens a completion'
    strongest = max(abs(completion.advantage) for completion in completions)

    def place(key):         # those that teach something first; then by group and turn, agents as they came
        return not judge and has_equal_rewards(groups[key]), *key[::2]

    in_order = sorted(groups, key=place)
    parts = '\n'.join(html_group(key, groups[key], strongest, judge) for key in in_order[:GROUPS_SHOWN])
    opened = ' open' if is_open else ''
    return f'<details class=step{opened}>{element("summary", facts)}\n{parts}</details>'


def has_equal_rewards(members):
    return len(members) > 1 and len({member.reward for member in members}) == 1


def rewards_of(completions):
    """The rewards of those that have one."""
    return [completion.reward for completion in completions if completion.reward is not None]


def html_group(key, members, strongest, judge):
    """The completions of one prompt; in the summary a cell for each."""
    group, agent, turn = key
    members = sorted(members, key=lambda member: member.sample)
    problem = members[0].problem
    name = f'prompt {group}' if judge else f'group {group}'
    if agent:
        name += f', {agent}, turn {turn}'
    question = str(problem.get('question', ''))
    start = question if len(question) < 120 else question[:117] + '...'
    whole = f'<div class=question>{escape(members[0].prompt or question)}</div>'
    answer = f' &rarr; {escape(str(problem["answer"]))}' if 'answer' in problem else ''
    cells = ''.join(cell(member.advantage, strongest) for member in members)
    samples = ''.join(html_sample(member, strongest) for member in members)
    return (f'<details class=group><summary><span class=cells>{cells}</span>{escape(name)}: {escape(start)}'
            f'{answer}</summary>{whole}{samples}</details>')


def html_sample(completion, strongest):
    facts = f'reward {score(completion.reward, "unscored")}, advantage {completion.advantage:+.2f}'
    more = f'{completion.length} tokens'
    if turns := sum(is_own for *_, is_own in completion.parts):
        more += f' in {turns} turn{"s" * (turns > 1)}'
    if not completion.stopped:
        more += ', cut off'
    if len(completion.rewards) > 1:
        called = short_names(completion.rewards)
        more += '; ' + ', '.join(f'{called[name]} {score(value, "none")}'
                                 for name, value in completion.rewards.items())
    parts = completion.parts or [[completion.text, 0, True]]
    texts = ''.join(element('span' if is_own else 'i', shortened(text)) for text, _, is_own in parts)
    return (f'<div class=sample style="background:{shade(completion.advantage, strongest)}">'
            f'<span class=facts>{escape(facts)}<br>{escape(more)}</span><code>{texts}</code></div>')


def shortened(text):
    if len(text) > TEXT_SHOWN:
        text = f'{text[:TEXT_SHOWN]} ... ({len(text) - TEXT_SHOWN} more characters)'
    return text


def score(reward, missing):
    return missing if reward is None else f'{reward:g}'


def explain_group(members, judge=''):
    """The completions of one prompt in words: the question, each with its reward and advantage, and what the
    update made of them, compared with each other or with what a critic or a teacher made of each token."""
    rewards, problem = rewards_of(members), members[0].problem
    question, answer = problem.get('question', ''), problem.get('answer')
    lines = [f'--- {"prompt" if judge else "group"} {members[0].group}: {question!r}, answer {answer!r}']
    for member in members:
        reward = 'unscored' if member.reward is None else f'{member.reward:g}'
        cut = '' if member.stopped else '(cut off) '
        said = ' '.join(repr(text) for text, *_ in member.parts) or repr(member.text)
        lines.append(f'  {reward:>8}  {member.advantage:+.3f}  {cut}{said}')
    likelier = sum(member.advantage > 0 for member in members)
    if judge:
        better = 'likelier to the teacher' if judge == 'teacher' else 'better than the critic expected'
        verdict = (f'{likelier} of {len(members)} completions are made likelier: their tokens were {better}, '
                   'in the mean')
    elif len(rewards) < 2:
        verdict = (f'nothing to learn: {len(rewards)} of {len(members)} completions have a score, '
                   'and one is compared with others')
    elif min(rewards) == max(rewards):
        verdict = f'nothing to learn: all rewards are {rewards[0]:g}, so every advantage is 0'
    else:
        verdict = (f'{likelier} of {len(members)} completions are made likelier: '
                   f'rewards from {min(rewards):g} to {max(rewards):g}')
    return '\n'.join([*lines, '  ' + verdict])


def explain_no_signal(algorithm, rewards, completion):
    """The end of a run in which rewards never differed, with a completion of it, or None."""
    where = 'rollout' if algorithm == 'ppo' else 'prompt'
    text = f'nothing was learned: no completion ever earned more than another of its {where}'
    if completion is None:          # the run had ended before
        return text
    wanted = f'  wanted    {completion.problem["answer"]!r}\n' if 'answer' in completion.problem else ''
    return (f'{text}. The first one:\n  asked     {completion.prompt[-300:]!r}\n'
            f'  answered  {completion.text[:300]!r}\n{wanted}'
            f'  reward    {score(completion.reward, "none")}, by {" + ".join(rewards)}')


# ---- episodes of agents -----------------------------------------------------------------------------------

EPISODES_NOTE = (
    'What every agent was asked in each state, its candidates with reward and advantage, and in yellow the '
    "one that was executed. An episode's reward is the sum over its turns: a team that solves sooner may be "
    'paid less often.')


def episodes_page(directory, newest=40):
    """episodes.html in the folder of a run of agents: the newest episodes of episodes.jsonl as trees, and
    some of the last validation."""
    directory = Path(directory)
    series, header = read_log(directory / 'log.jsonl')
    parts = [html_facts(directory / 'checkpoints', header), element('p', EPISODES_NOTE),
             svg.curves(series, {'reward': BLUE}),
             svg.curves(series, {'validation/success_rate': GREEN, 'validation/greedy_success_rate': ORANGE}),
             html_episodes('Training', directory / 'episodes.jsonl', newest)]
    validations = list((directory / 'validate').glob('step-*.jsonl'))
    if validations:
        last = max(validations, key=lambda path: int(path.stem.removeprefix('step-')))
        parts.append(html_episodes('Validation', last, 20))
    body = f'<div class=episodes>{"".join(parts)}</div>'
    write_text(directory / 'episodes.html', html_page(directory.parent.parent.name, body))


def html_episodes(title, path, count):
    """The last `count` episodes of a file, newest first; '' where there are none."""
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    episodes = [json.loads(line) for line in reversed(lines[-count:])]
    return element('h2', title) + ''.join(map(html_episode, episodes)) if episodes else ''


def html_episode(episode):
    """A line of episodes.jsonl: in the summary how it ended, below it the states one after the other, and a
    table for every turn of every agent."""
    end = '<b class=good>solved</b>' if episode['success'] else '<b class=bad>not solved</b>'
    manner = f', {episode["manner"]}' if 'manner' in episode else ''
    turns = ''.join(map(html_turn, episode['turns']))
    return (f'<details><summary>step {episode["step"]}{manner}, problem {episode["episode"]}: {end}, '
            f'reward {episode["reward"]:.2f}, {len(episode["turns"])} answers</summary>{html_story(episode)}'
            f'{turns}{html_view(episode["end"])}</details>')


def html_story(episode):
    """The boards of an episode in a row, and between them the answer that led from one to the next; '' where
    its states are no boards."""
    views = [*(turn['view'] for turn in episode['turns']), episode['end']]
    if not all(map(svg.is_board, views)):
        return ''
    parts = [svg.board(views[0])]
    for turn, before, after in zip(episode['turns'], views, views[1:]):
        if after != before:
            answer = turn['candidates'][turn['executed']]['text']
            parts.append(f'<div>{escape(turn["agent"])}<br>{escape(answer[:60])}<br>&rarr;</div>')
            parts.append(svg.board(after))
    return f'<div class=story>{"".join(parts)}</div>'


def html_view(view):
    """A state: drawn if it is a board, else its text."""
    return svg.board(view) if svg.is_board(view) else element('pre', view)


def html_turn(turn):
    """What an agent saw, and its candidates."""
    rows = []
    for candidate in turn['candidates']:
        numbers = f'{candidate["reward"]:.2f}', f'{candidate["advantage"]:+.2f}'
        rows.append([candidate['text'], candidate['note'], *numbers])
    table = html_table(['answer', 'outcome', 'reward', 'advantage'], rows, turn['executed'])
    asked = escape(turn['messages'][-1]['content'])
    return (f'<p><b>turn {turn["turn"] + 1}, {escape(turn["agent"])}</b> <span class=facts>{asked}</span></p>'
            f'<div class=turn>{html_view(turn["view"])}{table}</div>')
