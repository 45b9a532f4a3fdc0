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

from data.completions import read_completions
from data.rewards import short_names
from nanoforge.checkpoint import write_text
from nanoforge.plots import BLUE, GREEN, ORANGE, read_log

# ---- what all pages share ---------------------------------------------------------------------------------

STYLE = '''
body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:66rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;font-size:1.2rem}img{max-width:100%}
summary{cursor:pointer;padding:.2rem 0}.facts{color:#666;font-size:.85rem}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid #e6e6e6}
th{border-bottom:2px solid #999}.n{text-align:right}td.n{white-space:nowrap}
.example{border-left:4px solid #d9622b;padding:.2rem 1rem;margin:1rem 0;background:#fafafa}
.example.correct{border-color:#4a9b6e}
.example b{display:inline-block;width:6rem;color:#777;font-weight:normal}
.example div{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0}
.step>summary{font-weight:600;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
.group{margin:.3rem 0 .3rem 1rem}.group>summary{overflow-wrap:anywhere}
.question{color:#555;white-space:pre-wrap;margin:.2rem 0 .4rem}
.cells{display:inline-flex;gap:2px;vertical-align:middle;margin-right:.6rem}
.cells i,.key i{width:.8rem;height:.8rem;border-radius:2px;display:block}
.key i{display:inline-block;margin:0 .3rem 0 1rem;vertical-align:-1px}
.sample{display:grid;grid-template-columns:13rem 1fr;gap:.8rem;padding:.25rem .5rem;margin:2px 0;
border-radius:4px}
.sample code{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.4 ui-monospace,monospace}
.episodes details{border:1px solid #ddd;border-radius:6px;margin:.5em 0;padding:.4em .8em}
.turn{display:flex;gap:1.4em;align-items:flex-start;margin:.8em 0;flex-wrap:wrap}
.turn table{flex:1;min-width:24em;margin:0}.executed{background:#fff3c4;font-weight:600}
.episodes pre{font:15px/1.2 ui-monospace,monospace;margin:0;padding:.5em .7em;background:#f5f5f5;
border-radius:4px;white-space:pre-wrap}
.good{color:#1a7f37}.bad{color:#b3261e}'''
WORDS = ('', 'what it means', 'tool', 'most often instead', 'answer', 'outcome')     # columns without numbers


def html_page(title, body):
    title = escape(title)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n')


def element(tag, text):
    return f'<{tag}>{escape(text)}</{tag}>'


def html_table(headers, rows, executed=None):
    """A table of texts, numbers to the right. executed: number of the row that stands out."""
    sides = ['' if header in WORDS else ' class=n' for header in headers]

    def line(tag, cells):
        return ''.join(f'<{tag}{side}>{escape(text)}</{tag}>' for side, text in zip(sides, cells))

    marks = [' class=executed' if i == executed else '' for i in range(len(rows))]
    body = ''.join(f'<tr{mark}>{line("td", row)}</tr>' for mark, row in zip(marks, rows))
    return f'<table><tr>{line("th", headers)}</tr>{body}</table>'


# ---- rollouts of reinforcement learning -------------------------------------------------------------------

STEPS_SHOWN = 12            # spread over the run, the first and the last among them
GROUPS_SHOWN = 12           # of each step
TEXT_SHOWN = 2000           # characters of a completion


def rollouts_page(jsonl_path, html_path, title, has_critic=False):
    """rollouts.jsonl as a page: of a long run some steps are shown, of a step some groups: the completions of
    a prompt. With a critic they are not compared with each other."""
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
    if has_critic:
        note += " An advantage is the mean over a completion's tokens, each by the critic."
    grey = 'unscored' if has_critic else 'nothing to learn (equal rewards, or unscored)'
    key = ''.join(cell(advantage, 1) + meaning for advantage, meaning in
                  ((1, 'made likelier'), (-1, 'made less likely'), (0, grey)))
    prompt = by_step[shown[0]][0].prompt
    asked = f'<p>The first prompt, as the model read it:</p><div class=question>{escape(prompt)}</div>'
    parts = [html_step(step, by_step[step], step == shown[-1], has_critic) for step in shown]
    body = '\n'.join([element('p', note) + f'<p class=key>{key}</p>', asked if prompt else '', *parts])
    write_text(html_path, html_page(title, body))


def shade(advantage, strongest):
    """The colour of an advantage: green where a sample is made likelier, red where less likely, else grey."""
    if not advantage:
        return '#eeeeee'
    hue = 140 if advantage > 0 else 8
    share = min(1.0, abs(advantage) / strongest) if strongest else 0.0
    return f'hsl({hue} 65% {94 - 30 * share:.0f}%)'


def cell(advantage, strongest):
    """A small square in that colour."""
    return f'<i style="background:{shade(advantage, strongest)}"></i>'


def html_step(step, completions, is_open, has_critic):
    groups = {}
    for completion in completions:
        groups.setdefault((completion.group, completion.agent, completion.turn), []).append(completion)
    rewards = rewards_of(completions)
    mean_reward = sum(rewards) / len(rewards) if rewards else float('nan')
    mean_length = sum(len(completion.completion_ids) for completion in completions) / len(completions)
    facts = f'step {step}: reward {mean_reward:.3f}, {len(groups)} {"prompts" if has_critic else "groups"}'
    if not has_critic and (equal := sum(map(has_equal_rewards, groups.values()))):
        facts += f' ({equal} with equal rewards)'
    facts += f', {mean_length:.0f} tokens a completion'
    strongest = max(abs(completion.advantage) for completion in completions)
    in_order = sorted(groups, key=lambda key: key[::2])         # by group and turn; agents as they came
    parts = '\n'.join(html_group(key, groups[key], strongest, has_critic) for key in in_order[:GROUPS_SHOWN])
    opened = ' open' if is_open else ''
    return f'<details class=step{opened}>{element("summary", facts)}\n{parts}</details>'


def has_equal_rewards(members):
    return len(members) > 1 and len({member.reward for member in members}) == 1


def rewards_of(completions):
    """The rewards of those that have one."""
    return [completion.reward for completion in completions if completion.reward is not None]


def html_group(key, members, strongest, has_critic):
    """The completions of one prompt; in the summary a cell for each."""
    group, agent, turn = key
    members = sorted(members, key=lambda member: member.sample)
    problem = members[0].problem
    name = f'prompt {group}' if has_critic else f'group {group}'
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
    more = f'{len(completion.completion_ids)} tokens'
    if not completion.stopped:
        more += ', cut off'
    if len(completion.rewards) > 1:
        called = short_names(completion.rewards)
        more += '; ' + ', '.join(f'{called[name]} {score(value, "none")}'
                                 for name, value in completion.rewards.items())
    text = completion.text
    if len(text) > TEXT_SHOWN:
        text = f'{text[:TEXT_SHOWN]} ... ({len(text) - TEXT_SHOWN} more characters)'
    return (f'<div class=sample style="background:{shade(completion.advantage, strongest)}">'
            f'<span class=facts>{escape(facts)}<br>{escape(more)}</span>{element("code", text)}</div>')


def score(reward, missing):
    return missing if reward is None else f'{reward:g}'


def explain_group(members, has_critic=False):
    """The completions of one prompt in words: the question, each with its reward and advantage, and what the
    update made of them, compared with each other or, has_critic, with what a critic expected."""
    rewards, problem = rewards_of(members), members[0].problem
    question, answer = problem.get('question', ''), problem.get('answer')
    lines = [f'--- {"prompt" if has_critic else "group"} {members[0].group}: {question!r}, answer {answer!r}']
    for member in members:
        reward = 'unscored' if member.reward is None else member.reward
        cut = '' if member.stopped else '(cut off) '
        lines.append(f'  {reward:>8}  {member.advantage:+.3f}  {cut}{member.text!r}')
    likelier = sum(member.advantage > 0 for member in members)
    if has_critic:
        verdict = (f'{likelier} of {len(members)} completions are made likelier: their tokens were better '
                   'than the critic expected, in the mean')
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
    series, _ = read_log(directory / 'log.jsonl')
    parts = [element('p', EPISODES_NOTE),
             svg_curves(series, {'reward': BLUE}),
             svg_curves(series, {'validation/success_rate': GREEN, 'validation/greedy_success_rate': ORANGE}),
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


def svg_curves(series, colours, width=440, height=150):
    """Curves of {name: ([steps], [values])} as one SVG, and their first and last values; '' without any."""
    shown = {name: series[name] for name in colours if len(series.get(name, ([], []))[0]) > 1}
    if not shown:
        return ''
    last = max(steps[-1] for steps, _ in shown.values()) or 1
    low = min(min(values) for _, values in shown.values())
    high = max(max(values) for _, values in shown.values())
    scale = (height - 20) / ((high - low) or 1)
    lines, captions = [], []
    for name, (steps, values) in shown.items():
        points = ' '.join(f'{width * step / last:.1f},{10 + scale * (high - value):.1f}'
                          for step, value in zip(steps, values))
        lines.append(f'<polyline fill="none" stroke-width="2" stroke="{colours[name]}" points="{points}"/>')
        captions.append(f'<span style="color:{colours[name]}">{escape(name)} {short(values[0])} &rarr; '
                        f'{short(values[-1])}</span>')
    return (f'<div class=turn><svg width="{width}" height="{height}" style="background:#fafafa">'
            f'{"".join(lines)}</svg><p>{"<br>".join(captions)}</p></div>')


def short(value):
    return f'{value:.3f}' if abs(value) < 100 else f'{value:.0f}'


def html_episode(episode):
    """A line of episodes.jsonl: in the summary how it ended, below a table for every turn of every agent."""
    end = '<b class=good>solved</b>' if episode['success'] else '<b class=bad>not solved</b>'
    manner = f', {episode["manner"]}' if 'manner' in episode else ''
    turns = ''.join(map(html_turn, episode['turns']))
    return (f'<details><summary>step {episode["step"]}{manner}, problem {episode["episode"]}: {end}, '
            f'reward {episode["reward"]:.2f}, {len(episode["turns"])} answers</summary>{turns}'
            f'{element("pre", episode["end"])}</details>')


def html_turn(turn):
    """What an agent saw, and its candidates."""
    rows = []
    for candidate in turn['candidates']:
        numbers = f'{candidate["reward"]:.2f}', f'{candidate["advantage"]:+.2f}'
        rows.append([candidate['text'], candidate['note'], *numbers])
    table = html_table(['answer', 'outcome', 'reward', 'advantage'], rows, turn['executed'])
    asked = escape(turn['messages'][-1]['content'])
    return (f'<p><b>turn {turn["turn"] + 1}, {escape(turn["agent"])}</b> <span class=facts>{asked}</span></p>'
            f'<div class=turn>{element("pre", turn["view"])}{table}</div>')
