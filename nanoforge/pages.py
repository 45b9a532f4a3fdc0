"""What a reinforcement-learning run looks like: reward.png drawn from log.jsonl, and rollouts.html, in which samples are read, from
rollouts.jsonl. Both are made from files alone, so a resumed run's are whole."""
import html
import itertools
from pathlib import Path

from nanoforge.checkpoint import write_text
from data.completions import read_episodes
from nanoforge.plots import read_log, smooth

GROUPS_SHOWN = 12           # of each step
STEPS_SHOWN = 12            # spread over the run, the first and the last among them
TEXT_SHOWN = 2000           # characters of a completion
PANELS = (('reward', ('reward', 'rewards', 'success_rate', 'eval_accuracy', 'eval_accuracy_sampled', 'eval_reward')),
          ('completion length (tokens)', ('completions/mean_length',)),
          ('shares', ('completions/clipped_ratio', 'frac_reward_zero_std', 'clip_ratio/region_mean', 'explained_variance')),
          ('entropy and KL (nats per token)', ('entropy', 'kl', 'approx_kl')))


def reward_picture(log_path, png_path, title):
    """Reward and accuracy over steps, and below them length, shares, entropy and KL; writes a PNG. A log without a reward leaves none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    series, _ = read_log(log_path)
    if 'reward' not in series and 'eval_reward' not in series:
        return
    figure = Figure(figsize=(10, 7.2), dpi=110, layout='constrained')
    grid = figure.add_gridspec(2, 3, height_ratios=[3, 2])
    places = [figure.add_subplot(grid[0, :]), *(figure.add_subplot(grid[1, i]) for i in range(3))]
    colours = ['#3b6fb6', '#999999', '#7fb069', '#d9622b', '#e8a87c', '#8e5ea2']
    for axes, (label, names) in zip(places, PANELS):
        if label == 'reward' and 'eval_accuracy' in series:
            names = [name for name in names if name != 'eval_reward']
        for colour, name in zip(itertools.cycle(colours), names):
            if name not in series or name == 'success_rate' and series[name][1] == series.get('reward', ((), ()))[1]:
                continue                                # where the success is the reward, one line is enough
            steps, values = series[name]
            measured = name.startswith('eval')
            if len(values) > 50 and not measured:
                axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            curve = values if measured else smooth(values, len(values) // 50)
            axes.plot(steps, curve, color=colour, linewidth=1.8, marker='o' if measured else None, markersize=3.5,
                      label=f'{name} {values[-1]:.3g}')
        axes.set_ylabel(label, fontsize=9)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='#e6e6e6', linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(fontsize=8 if axes is places[0] else 7, frameon=False)
    places[0].set_title(title, fontsize=13, loc='left')
    places[0].set_xlabel('optimizer step', fontsize=9)
    temporary = Path(png_path).with_name('.nanoforge-tmp-' + Path(png_path).name)
    figure.savefig(temporary, format='png')
    temporary.replace(png_path)


STYLE = '''body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:70rem;margin:2rem auto;padding:0 1rem}
summary{cursor:pointer;padding:.2rem 0}.step>summary{font-weight:600;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
.group{margin:.3rem 0 .3rem 1rem}.group>summary{overflow-wrap:anywhere}.question{color:#555;white-space:pre-wrap;margin:.2rem 0 .4rem}
.cells{display:inline-flex;gap:2px;vertical-align:middle;margin-right:.6rem}.cells i{width:.8rem;height:.8rem;border-radius:2px;display:block}
.sample{display:grid;grid-template-columns:13rem 1fr;gap:.8rem;padding:.25rem .5rem;border-radius:4px;margin:2px 0}
.sample code{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.4 ui-monospace,monospace}.facts{color:#555;font-size:.82rem}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin:0 .3rem 0 1rem;vertical-align:-1px}'''


def shade(advantage, strongest):
    """The colour of a sample: green where it is made likelier, red where it is made less likely, grey where neither."""
    if not advantage:
        return '#eeeeee'
    share = min(1.0, abs(advantage) / strongest) if strongest else 0.0
    return f'hsl({140 if advantage > 0 else 8} 65% {94 - 30 * share:.0f}%)'


def rollouts_page(jsonl_path, html_path, title):
    """One file that needs no other; all that a model wrote is escaped. Of a long run some steps are shown, of a step some groups."""
    by_step = {}
    for episode in read_episodes(jsonl_path):
        by_step.setdefault(episode.step, []).append(episode)
    steps = sorted(by_step)
    if not steps:
        return
    last = len(steps) - 1
    shown = sorted({steps[round(i * last / max(1, STEPS_SHOWN - 1))] for i in range(STEPS_SHOWN)})
    parts = [step_part(step, by_step[step], is_open=step == shown[-1]) for step in shown]
    key = ''.join(f'<i style="background:{shade(a, 1)}"></i>{words}' for a, words in (
        (1, 'made likelier'), (-1, 'made less likely'), (0, 'nothing to learn (equal rewards, or unscored)')))
    note = f'{len(shown)} of {len(steps)} rollouts, up to {GROUPS_SHOWN} groups of each; all are in {Path(jsonl_path).name}.'
    body = f'<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p><p class=key>{key}</p>\n' + '\n'.join(parts)
    write_text(html_path, f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
                          f'<style>{STYLE}</style></head>\n<body>{body}\n</body></html>\n')


def step_part(step, episodes, is_open):
    groups = {}
    for episode in episodes:
        groups.setdefault((episode.group, episode.agent, episode.turn), []).append(episode)
    scored = [e.reward for e in episodes if e.reward is not None]
    mean = sum(scored) / len(scored) if scored else float('nan')
    dead = sum(len({e.reward for e in members}) == 1 for members in groups.values() if len(members) > 1)
    length = sum(len(e.completion_ids) for e in episodes) / len(episodes)
    facts = f'step {step}: reward {mean:.3f}, {len(groups)} groups' + (f' ({dead} with equal rewards)' if dead else '') + f', {length:.0f} tokens a completion'
    strongest = max(abs(e.advantage) for e in episodes)
    keys = sorted(groups, key=lambda key: key[::2])         # by group and turn; agents as they came
    parts = [group_part(key, sorted(groups[key], key=lambda e: e.sample), strongest) for key in keys[:GROUPS_SHOWN]]
    return f'<details class=step{" open" if is_open else ""}><summary>{html.escape(facts)}</summary>\n' + '\n'.join(parts) + '</details>'


def group_part(key, members, strongest):
    number, agent, turn = key
    first = members[0]
    question = str(first.problem.get('question', ''))
    name = f'group {number}' + (f', {agent}, turn {turn}' if agent else '')
    cells = ''.join(f'<i style="background:{shade(e.advantage, strongest)}"></i>' for e in members)
    head = question if len(question) < 120 else question[:117] + '...'
    answer = f' &rarr; {html.escape(str(first.problem["answer"]))}' if 'answer' in first.problem else ''
    samples = ''.join(sample_part(e, strongest) for e in members)
    whole = f'<div class=question>{html.escape(question)}</div>' if head != question else ''
    return (f'<details class=group><summary><span class=cells>{cells}</span>{html.escape(name)}: {html.escape(head)}{answer}</summary>'
            f'{whole}{samples}</details>')


def sample_part(e, strongest):
    names = ', '.join(f'{name.rpartition("/")[2]} {"none" if value is None else f"{value:g}"}' for name, value in e.rewards.items())
    facts = f'reward {"unscored" if e.reward is None else f"{e.reward:g}"}, advantage {e.advantage:+.2f}'
    more = f'{len(e.completion_ids)} tokens' + ('' if e.stopped else ', cut off') + (f'; {names}' if len(e.rewards) > 1 else '')
    text = e.text if len(e.text) <= TEXT_SHOWN else e.text[:TEXT_SHOWN] + f' ... ({len(e.text) - TEXT_SHOWN} more characters)'
    return (f'<div class=sample style="background:{shade(e.advantage, strongest)}"><span class=facts>{html.escape(facts)}<br>{html.escape(more)}</span>'
            f'<code>{html.escape(text)}</code></div>')


def explain_group(members):
    """A group in words: the question, every completion with its reward and advantage, and what the update made of it."""
    first = members[0]
    lines = [f'--- group {first.group}: {first.problem.get("question", "")!r}, answer {first.problem.get("answer")!r}']
    lines += [f'  {e.reward if e.reward is not None else "unscored":>8}  {e.advantage:+.3f}  {"" if e.stopped else "(cut off) "}{e.text!r}' for e in members]
    rewards = [e.reward for e in members if e.reward is not None]
    if len(members) == 1:
        verdict = 'advantages come from the critic'
    elif len(rewards) < 2:
        verdict = f'nothing to learn: {len(rewards)} of {len(members)} completions have a score, and one is compared with others'
    elif min(rewards) == max(rewards):
        verdict = f'nothing to learn: all rewards are {rewards[0]:g}, so every advantage is 0'
    else:
        above = sum(e.advantage > 0 for e in members)
        verdict = f'{above} of {len(members)} completions are made likelier: rewards from {min(rewards):g} to {max(rewards):g}'
    return '\n'.join([*lines, '  ' + verdict])
