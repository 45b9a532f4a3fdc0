"""
Checkpoints that survive a kill at any instant, and the output folder that they lie in.

    start_fresh(run, out_dir, as_dict(cfg))             # a new run
    checkpoints = Checkpoints(out_dir, run)
    checkpoints.save(step, write_model, optimizer.state_dict(), state, best=loss < best_loss)

    path = checkpoints.latest()                         # to resume
    optimizer_state, state = read_checkpoint(path)
    checkpoints.discard_later(path)
"""
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import socket
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from configurator import UserError, as_text, check_settings, from_dict, path_of
from nanoforge.launch import launched
from nanoforge.tensors import save_tensors

try:
    import fcntl
except ImportError:
    fcntl = None        # Windows

TEMPORARY = '.nanoforge-tmp-'
LOCK = '.nanoforge-lock'        # of the output folder: held by the process that writes there
VERSION = 2         # of run_config.json; 1 had no version, and every script its own rule of what is held out
# of a checkpoint; its other files are the model
STATE_FILES = ('optimizer.safetensors', 'trainer_state.json')
# of the root of the output folder, beside the model
PARTS = ('merged', 'reward_model')      # folders there that are models
RUN_FILES = ('log.jsonl', 'loss.png', 'reward.png', 'margins.png', 'samples.txt', 'rollouts.jsonl',
             'rollouts.html', 'manifest.json', 'last', 'best', *PARTS)


@contextlib.contextmanager
def writing(path):
    """A full disk, or a folder that cannot be written, as one line; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'cannot write {path}: {reason}; checkpoints written before are intact') from None


def fsync(path):
    if os.name == 'posix':      # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def atomic_write(path, write):
    """write(a temporary path), then rename: whenever the power fails, `path` is the old file or the new."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.unlink(missing_ok=True)
    write(temporary)
    os.replace(temporary, path)


def write_text(path, text):
    def write(temporary):
        # half a character, of a path or a row, as JSON spells it
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace')
        fsync(temporary)
    atomic_write(Path(path), write)


def append_text(path, text):
    with writing(path), open(path, 'a', encoding='utf-8', errors='replace') as file:
        file.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def digest_of(manifest):
    """SHA-256 of all that a manifest says, but for its own 'sha256'."""
    content = {key: value for key, value in manifest.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path):
    """The JSON object in `path` if nanoforge wrote it and it is as it was written, else {}."""
    try:
        value = json.loads(Path(path).read_text(encoding='utf-8'))
        is_whole = value.get('sha256') in (None, digest_of(value))      # earlier versions wrote none
        return value if is_whole and value['written_by'] == 'nanoforge' else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_manifest(folder, manifest):
    write_json(folder / 'manifest.json', {**manifest, 'sha256': digest_of(manifest)})


def hardlink(source, target):
    """`target` becomes `source`: a hard link, or a copy where there are none."""
    def write(temporary):
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
    # between two names of one file, a rename does nothing
    if not (target.exists() and source.samefile(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, write)


def symlink(path, name):
    """`path` becomes a symlink to its neighbour `name`, or where there are none a text file with the name."""
    def write(temporary):
        try:
            temporary.symlink_to(name)
        except (OSError, NotImplementedError):
            temporary.write_text(name, encoding='utf-8')
    atomic_write(path, write)


def resolve_link(path):
    """The folder behind out/last or out/best, also where these are text files."""
    path = Path(path)
    is_text = path.name in ('last', 'best') and path.is_file()
    return path.with_name(path.read_text(encoding='utf-8')) if is_text else path


def move_aside(out_dir, paths):
    """Move `paths` to a new folder earlier-K in out_dir, which is returned."""
    numbered = (out_dir / f'earlier-{k}' for k in itertools.count(1))
    earlier = next(path for path in numbered if not os.path.lexists(path))
    for path in paths:
        target = earlier / path.relative_to(out_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    return earlier


def checkpoint_folders(out_dir):
    """[(path, manifest)] of all checkpoints in out_dir, oldest step first, whichever run wrote them."""
    folders = []
    for path in out_dir.iterdir() if out_dir.is_dir() else ():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith((TEMPORARY, 'earlier-')):
            if manifest := read_manifest(path / 'manifest.json'):
                folders.append((path, manifest))
    return sorted(folders, key=lambda folder: folder[1]['step'])


def checkpoints_of(out_dir, run_ids):
    """checkpoint_folders() that these runs wrote, under the names that they gave them: what was copied or
    renamed is somebody's own."""
    return [(path, manifest) for path, manifest in checkpoint_folders(out_dir)
            if manifest['run'] in run_ids and manifest.get('folder', path.name) == path.name]


def run_of(path):
    """What the run_config.json of the run said that wrote the model in folder `path`, {} where none is known.

    A checkpoint has it in its manifest; of one without, as earlier versions wrote them, the folder around it
    is asked, and the earlier-K in there.
    """
    folder = Path(os.path.realpath(resolve_link(path)))
    for owner in (folder, folder.parent):       # the folder, or the checkpoint or run that it is a part of
        manifest, part = read_manifest(owner / 'manifest.json'), folder.name + '/'
        is_part = folder.name in PARTS or any(name.startswith(part) for name in manifest.get('files', ()))
        if owner != folder and not is_part:
            continue
        if saved := read_manifest(owner / 'run_config.json') or manifest.get('settings'):
            return saved
        if manifest or owner.name.startswith('checkpoint-'):
            for around in (owner.parent, *sorted(owner.parent.glob('earlier-*'))):
                saved = read_manifest(around / 'run_config.json')
                if saved and saved.get('run') == manifest.get('run', saved.get('run')):
                    return saved
    return {}


def merged_config(cfg, saved):
    """The configuration of `saved`, a run_config.json, but for the fields that were typed in cfg."""
    merged = from_dict(type(cfg), saved['config'], cfg)
    if saved.get('version', 1) < VERSION and hasattr(merged, 'split_rule'):
        merged.split_rule = 'legacy'        # it goes on with the rows held out that it began with
    return merged


def loaded_config(cfg, path, script):
    """(configuration, text) of a new run of `script` on the weights of a checkpoint `path`.

    Model, data and training are as in the run that wrote the checkpoint, but for what is typed, for where and
    how this run goes, and for all of the data where other data sets are typed. The text says what was taken
    over: '' where no run of `script` is known to have written it.
    """
    anew = ['output_dir', 'load_checkpoint', 'resume', 'resume_from_checkpoint']
    saved = run_of(path)
    if saved.get('script') != script:
        return cfg, ''
    merged, default, taken = merged_config(cfg, saved), type(cfg)(), []
    sections = {'model', 'training'}
    if not cfg.typed & {'dataset_path', 'datasets'}:
        sections.add('data')
    if 'num_train_epochs' in cfg.typed:
        anew.append('max_steps')            # which would beat it
    for field in dataclasses.fields(cfg):
        name, section = field.name, path_of(field).partition('.')[0]
        if name in anew or section not in sections:
            setattr(merged, name, getattr(cfg, name))
        elif name not in cfg.typed and (value := getattr(merged, name)) != getattr(default, name):
            if name == 'datasets':
                value = [source.name for source in value]
            taken.append(f'{name}={as_text(value)}')
    check_settings(merged)
    return merged, ', '.join(taken)


def resume_config(cfg, out_dir, script, flag='--resume', from_start=False):
    """(configuration, what run_config.json says) of the run of `script` in out_dir.

    The configuration is the saved one, but for the fields that were typed again in cfg. It is asked for
    before setup(): a run goes on with the device and the precision that it had. Where there is no run with a
    checkpoint (from_start: none is needed) it is a UserError; with cfg.resume == 'auto' the result is (cfg,
    None).
    """
    saved = read_manifest(Path(out_dir) / 'run_config.json') or restored_settings(Path(out_dir))
    is_there = saved.get('script') == script
    if is_there and not from_start:
        is_there = any(manifest['run'] == saved['run'] for _, manifest in checkpoint_folders(Path(out_dir)))
    if not is_there and getattr(cfg, 'resume', None) == 'auto':
        return cfg, None
    if not is_there:
        raise UserError(f'{flag}: {out_dir} holds no run of {script} with a checkpoint; start one without '
                        f'{flag}')
    merged = merged_config(cfg, saved)
    check_settings(merged)
    return merged, saved


def restored_settings(out_dir):
    """What a run_config.json said that is there but cannot be read: the newest checkpoint has it, too. The
    main rank says so and writes it anew. {} where there is none, or checkpoints of several runs."""
    path, folders = out_dir / 'run_config.json', checkpoint_folders(out_dir)
    is_known = path.exists() and len({manifest['run'] for _, manifest in folders}) == 1
    settings = folders[-1][1].get('settings', {}) if is_known else {}
    if settings and launched()[0] == 0:
        print(f'{path} is damaged: as {folders[-1][0].name} has it')
        with writing(path):
            write_json(path, settings)
    return settings


def lock_folder(folder, print0):
    """Makes this process the one that writes in `folder`; returns the open file that holds the lock.

    The system takes the lock away when the process ends, however it does. UserError where another process has
    it. The locks are POSIX's: a child does not inherit them, and NFS passes them on to other machines. Where
    there are none (Windows, some network file systems) it is said, and nothing is refused.
    """
    file = open(folder / LOCK, 'a+', encoding='utf-8')      # 'a': what the holder wrote stays
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, 'none on this system')
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(f'{folder}: another run is writing there ({holder}): stop it, wait for its end, '
                            'or name another folder') from None
        print0(f'note      no file locks here ({error.strerror}): a second run in {folder} would not be '
               'refused')
        return file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file


def start_fresh(run, out_dir, config, keep=None, script=None, lock=None, **more):
    """Make out_dir ready for a new run, and write its run_config.json: {'run': an id, 'script', 'config'} and
    what `more` there is.

    What the earlier run of ours in this very folder left moves to out_dir/earlier-K. Nothing else is touched,
    be it another run in a folder in there, and a folder with somebody else's model is refused. `keep`: a path
    or several that the new run loads; what lies in out_dir stays where it is. `lock`: called before anything
    is written.
    """
    out_dir, loaded = Path(out_dir), [keep] if isinstance(keep, (str, Path)) else keep or ()
    loaded = [os.path.realpath(resolve_link(path)) + os.sep for path in loaded if path]
    settings = out_dir / 'run_config.json'

    def holds_loaded(path):
        return any(folder.startswith(os.path.realpath(path) + os.sep) for folder in loaded)

    def move_earlier_run():
        # what a run loaded stayed here when the earlier run that wrote it was moved
        runs = settings, *out_dir.glob(f'earlier-*/{settings.name}')
        ids = [read_manifest(path).get('run') for path in runs]
        folders = [path for path, _ in checkpoints_of(out_dir, ids)]
        model = set()
        for path in (out_dir, *folders):
            model.update(read_manifest(path / 'manifest.json').get('files', ()))
        paths = [*folders, *(out_dir / name for name in (*RUN_FILES, *model))]
        paths = [path for path in paths if os.path.lexists(path) and not holds_loaded(path)
                 and not (path / settings.name).exists()]       # `best` may be the name of a run of its own
        # settings last: till then the folder is known as ours
        earlier = move_aside(out_dir, [*paths, settings])
        for path in paths:
            if os.path.realpath(out_dir) + os.sep in loaded and path.relative_to(out_dir).as_posix() in model:
                # the new run loads the model of the root
                hardlink(earlier / path.relative_to(out_dir), path)
        run.print0(f'{out_dir} held an earlier run: its files are now in {earlier}')

    def make_ready():
        with writing(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            present = [name for name in ('config.json', 'model.safetensors', settings.name)
                       if (out_dir / name).exists()]
            if present and not read_manifest(settings):
                raise UserError(f'{out_dir} holds a {present[0]} that nanoforge did not write: choose '
                                'another folder')
            if lock:
                lock()
            if read_manifest(settings):
                move_earlier_run()
            write_json(settings, {'written_by': 'nanoforge', 'version': VERSION, 'run': secrets.token_hex(8),
                                  'script': script or os.path.basename(sys.argv[0]), 'config': config,
                                  **more})
    run.on_main(make_ready)


class Checkpoints:
    """The checkpoints of the run in out_dir. Only the main rank writes; all ranks call every method.

    A checkpoint is written under a temporary name, synced, given a manifest with sizes and SHA-256, and
    renamed: its final name means that it is whole. `last`, `best` and the model in the root follow from the
    manifests.

    limit            so many of the newest are kept, and the best; None keeps all
    save_only_model  all but the two newest lose their optimizer state: for use, not for resuming. Two, as one
                     may be found damaged
    """

    def __init__(self, out_dir, run, limit=2, save_only_model=False):
        self.out_dir, self.run, self.limit, self.save_only_model = Path(out_dir), run, limit, save_only_model
        self.lock_file = None

    def settings(self):
        """What run_config.json says."""
        return read_manifest(self.out_dir / 'run_config.json')

    def note(self, **changes):
        """Changes what run_config.json says. The main rank calls it."""
        with writing(self.out_dir):
            write_json(self.out_dir / 'run_config.json', {**self.settings(), **changes})

    def own(self):
        """[(path, manifest)] of this run's checkpoints, oldest first; those of another run may lie beside."""
        return checkpoints_of(self.out_dir, {self.settings().get('run')})

    def lock(self):
        """Until unlock() no other process writes in out_dir. The main rank calls it."""
        with writing(self.out_dir):
            self.lock_file = lock_folder(self.out_dir, self.run.print0)

    def unlock(self):
        if self.lock_file:
            self.lock_file.close()

    def latest(self):
        """The newest whole checkpoint, or None. Damaged ones are skipped, and said."""
        def find():
            candidates = [path for path, _ in self.own()]
            # looked at first, to be said
            candidates += [path for path in self.out_dir.glob('checkpoint-*')
                           if not read_manifest(path / 'manifest.json')]
            for i in reversed(range(len(candidates))):
                if not (reason := damage(candidates[i])):
                    return i
                self.run.print0(f'{candidates[i]} is skipped: {reason}')
        newest = self.run.on_main(find)
        newest = self.run.max(-1 if newest is None else newest)
        return str(self.own()[newest][0]) if newest >= 0 else None

    def say_processes(self, path):
        """Says it if checkpoint `path` is of another number of processes, which scales the batch."""
        now = self.run.world_size
        then = read_manifest(Path(path) / 'manifest.json').get('processes', now)
        if then != now:
            self.run.print0(f'note      the checkpoint is of {then} processes, this is {now}: from here on '
                            f'an optimizer step has {now / then:g} times as many rows, and the rest of the '
                            'run is not what it would have been; gradient_accumulation_steps can make up for '
                            'it')

    def discard_later(self, path):
        """Go on from checkpoint `path`: later ones of this run move to earlier-K."""
        def move_later():
            step = read_manifest(Path(path) / 'manifest.json')['step']
            with writing(self.out_dir):
                if later := [other for other, manifest in self.own() if manifest['step'] > step]:
                    earlier = move_aside(self.out_dir, later)
                    self.run.print0(f'{", ".join(map(str, later))}: later than step {step}, moved to '
                                    f'{earlier}')
                self._tidy()
        self.run.on_main(move_later)

    def save(self, step, write_model, optimizer, state, best=False, name=None):
        """Save checkpoint-`step` (or `name`).

        write_model(folder)  writes a Hugging Face model folder
        optimizer            {str: Tensor}
        state                JSON-able: what else the loop needs to go on
        best                 the best so far: `best` and the model in the root are this one until a better one

        UserError: the disk is full, or a tensor holds NaN or inf. What was saved before is intact.
        """
        def write():
            path = self.out_dir / (name or f'checkpoint-{step}')
            try:
                with writing(path):
                    self._clean()
                    self._write(path, step, write_model, optimizer, state, best)
                    self._tidy()
            finally:
                self._clean()
        self.run.on_main(write)

    def _write(self, path, step, write_model, optimizer, state, best):
        settings = self.settings()      # they stay with the checkpoint, whatever run comes into this folder
        manifest = {'written_by': 'nanoforge', 'run': settings.get('run'), 'step': step, 'best': best,
                    'processes': self.run.world_size, 'files': {}, 'settings': settings}
        while os.path.lexists(path):    # of this step already; or of another run, that we loaded; or not ours
            saved = read_manifest(path / 'manifest.json')
            if saved and (saved['run'], saved['step']) == (manifest['run'], step):
                return write_manifest(path, {**saved, 'best': best or saved['best']})
            self.run.print0(f'{path} is there already and not of this run: saving beside it, as '
                            f'{path.name}-new')
            path = path.with_name(path.name + '-new')
        manifest['folder'] = path.name
        folder = path.with_name(TEMPORARY + path.name)
        folder.mkdir()
        write_model(str(folder))
        layout = {key: ([tensor], False) for key, tensor in optimizer.items()}
        save_tensors(folder / 'optimizer.safetensors', layout)
        write_json(folder / 'trainer_state.json', state)
        for file in sorted(file for file in folder.rglob('*') if file.is_file()):
            if file.suffix == '.safetensors':
                check_finite(file, step)
                shutil.copymode(folder / 'trainer_state.json', file)    # safetensors lets only the owner read
            fsync(file)
            entry = {'size': file.stat().st_size, 'sha256': sha256(file)}
            manifest['files'][file.relative_to(folder).as_posix()] = entry
        write_manifest(folder, manifest)
        fsync(folder)
        os.replace(folder, path)
        fsync(self.out_dir)

    def _tidy(self):
        """Links, root, pruning: all follow from the manifests, so the next call does what a kill
        interrupts."""
        saved = self.own()
        if not saved:       # it goes on from a checkpoint that was renamed
            return
        last, best = saved[-1], next((pair for pair in reversed(saved) if pair[1]['best']), None)
        symlink(self.out_dir / 'last', last[0].name)
        if best:
            symlink(self.out_dir / 'best', best[0].name)
        path, manifest = best or last
        for name in {*manifest['files'], 'manifest.json'} - {*STATE_FILES}:
            hardlink(path / name, self.out_dir / name)
        keep = saved if self.limit is None else [best, *saved[-self.limit:]]
        for folder, manifest in saved[:-1]:
            if (folder, manifest) not in keep:
                doomed = folder.with_name(TEMPORARY + folder.name)
                os.replace(folder, doomed)     # out of sight first: a folder half deleted is no checkpoint
                shutil.rmtree(doomed)
            elif self.save_only_model and folder != saved[-2][0]:
                (folder / 'optimizer.safetensors').unlink(missing_ok=True)

    def _clean(self):
        """Remove what a killed process, or a failed save, left under temporary names."""
        for path in self.out_dir.glob(TEMPORARY + '*'):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_finite(path, step):
    with safe_open(path, 'pt') as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, 'pt') as file:     # opened for each, so that no more than one is in memory
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f'step {step}: {name} holds NaN or inf, so no checkpoint is written; earlier '
                            f'ones are intact: resume with a lower learning rate')


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def damage(path):
    """'' where every file of checkpoint `path` is what its manifest says, else what is wrong."""
    files = read_manifest(Path(path) / 'manifest.json').get('files')
    if not files:
        return 'its manifest.json is damaged, or not one of nanoforge'
    for name, entry in files.items():
        file = Path(path) / name
        if not file.is_file():
            return f'{name} is missing'
        if file.stat().st_size != entry['size']:
            return f'{name} is cut short: {file.stat().st_size} bytes of {entry["size"]}'
        if sha256(file) != entry['sha256']:
            return f'{name} is not what was written: its SHA-256 differs'
    return ''


def read_checkpoint(path):
    """(optimizer {str: Tensor} on the CPU, state) as save() was given them; UserError if damaged."""
    path = resolve_link(path)
    if reason := damage(path):
        raise UserError(f'cannot resume from {path}: {reason}')
    state = json.loads((path / 'trainer_state.json').read_text(encoding='utf-8'))
    return load_file(path / 'optimizer.safetensors'), state
