"""Episodes of several turns: a policy speaks, a user's environment (data/environments.py) answers.

An episode is one Completion, the transcript of both. What was sampled stays the ids that it was; between two
turns stands what the chat template writes there, encoded by itself, which is read and not learned. All but
the prompt counts towards max_completion_length.
"""
from configurator import UserError
from data.chat import ids_between_turns, prompt_ids
from data.completions import Completion
from nanoforge.run import seed_for


def play_episodes(cfg, environment, policy, tokenizer, draw, numbered, step, seed, temperature, num_samples):
    """[(number, problem)] -> Completions whose rewards have `env`, num_samples of each, played side by side.

    draw is sample.generate or does the same. What it draws depends on seed, number, sample and turn alone. An
    episode is `stopped` where the environment was done with a turn that had an end: not where tokens or turns
    ran out. A turn that is cut off is judged, too. The reward of an episode that failed is None.
    """
    episodes = begin(cfg, environment, tokenizer, numbered, step, num_samples)
    running = [key for key, episode in enumerate(episodes) if episode.rewards['env'] is not None]
    for turn in range(cfg.max_turns):
        if not running:
            break
        room = {key: min(cfg.max_completion_length, policy.config.block_size - len(episodes[key].prompt_ids))
                - len(episodes[key].completion_ids) for key in running}
        if turn == 0:                       # a prompt is computed once for its group
            firsts = sorted({key - episodes[key].sample for key in running})
            keys = [first + sample for first in firsts for sample in range(num_samples)]
            prompts = [episodes[first].prompt_ids for first in firsts]
            numbers, seed_of_turn = [episodes[first].group for first in firsts], seed
        else:
            keys = running
            prompts = [episodes[key].prompt_ids + episodes[key].completion_ids for key in keys]
            numbers = [episodes[key].group * num_samples + episodes[key].sample for key in keys]
            seed_of_turn = seed_for(seed, 'turn', turn)
        samples = draw(policy, prompts, max(room.values()), temperature, stop_ids=tokenizer.stop_ids,
                       seed=seed_of_turn, num_samples=len(keys) // len(prompts), numbers=numbers)
        columns = (samples.tokens, samples.lengths, samples.logp)
        for key, tokens, length, logp in zip(keys, *(column.tolist() for column in columns)):
            if key in room:
                length = min(length, room[key])             # others may have had more room
                speak(episodes[key], tokenizer, tokens[:length], logp[:length])
        answers = environment.step({key: episodes[key].text for key in running})
        running = [key for key in running
                   if goes_on(cfg, environment, tokenizer, episodes[key], answers[key], turn, room[key])]
    return episodes


def begin(cfg, environment, tokenizer, numbered, step, num_samples):
    """The Completions of new episodes, with their prompts and nothing said."""
    episodes = []
    for number, problem in numbered:
        shown = {key: value for key, value in problem.items() if key != 'prompt_ids'}
        episodes += [Completion(step, number, sample, shown, [], [], [], False, '', {'env': None})
                     for sample in range(num_samples)]
    answers = environment.begin([episode.problem for episode in episodes])
    for first in range(0, len(episodes), num_samples):
        group = slice(first, first + num_samples)
        chats = [answer[0] for answer in answers[group] if answer]
        if not chats:
            continue
        if any(chat != chats[0] for chat in chats):
            raise UserError(f'env: {environment.name}: reset gave two prompts for one problem; samples of a '
                            'group answer the same: draw what is random by the problem')
        prompt = environment.encoded(prompt_ids, tokenizer, chats[0], environment.tools)
        fits = len(prompt) <= cfg.max_prompt_length
        if not fits:
            environment.last_error = (f'a prompt of {len(prompt)} tokens exceeds max_prompt_length='
                                      f'{cfg.max_prompt_length}')
        for episode, answer in zip(episodes[group], answers[group]):
            episode.prompt_ids, episode.prompt = prompt, tokenizer.decode(prompt)
            if answer and fits:
                episode.rewards['env'] = 0.0
    return episodes


def speak(episode, tokenizer, ids, logp):
    """Puts a turn of the policy into an episode."""
    episode.stopped = ids[-1] in tokenizer.stop_ids         # which is learned, too, but is no text
    episode.text = tokenizer.decode(ids[:-1] if episode.stopped else ids)
    episode.completion_ids += ids
    episode.logp += logp
    episode.parts.append([episode.text, len(ids), True])


def goes_on(cfg, environment, tokenizer, episode, answer, turn, room):
    """Takes an answer of the environment into an episode: whether there is another turn. room: tokens that it
    had before this turn."""
    rewards = episode.rewards
    if answer is None:
        rewards['env'] = None
        return False
    messages, reward, done = answer
    known = rewards['env'] is not None and reward is not None
    rewards['env'] = rewards['env'] + reward if known else None
    if done or not episode.stopped:
        return False
    episode.stopped = False
    between = environment.encoded(ids_between_turns, tokenizer, messages, episode.completion_ids[-1])
    if turn + 1 == cfg.max_turns or len(between) >= room - episode.parts[-1][1]:
        return False                                        # nothing would be said to it
    episode.completion_ids += between
    episode.logp += [0.0] * len(between)
    episode.parts.append([tokenizer.decode(between), len(between), False])
    return True
