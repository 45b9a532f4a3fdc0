"""How a run ends badly: a user's mistake is one line and exit status 2, printed by one rank alone."""
import os, re, sys

FAILED = 'NANOFORGE_FAILED'  # a folder of the ranks, in which the first that fails leaves a file
LOST_RANK = re.compile('Connection (closed|reset) by peer|Connection was likely closed|Broken pipe|'
                       'remote process exited|timeout caused pair closure')      # gloo, NCCL, the store


class UserError(Exception):
    """A mistake of the user's: one line that says what, where, what was meant and how to fix it."""


class MainRankFailed(UserError):
    """On the other ranks, where the main one fails: that one prints why."""


def print_anywhere():
    """What the console's encoding lacks is printed as '?' (a pipe on Windows, LC_ALL=C), not an error."""
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's is of another kind; stderr's never fails
        sys.stdout.reconfigure(errors='replace')


def fail(error):
    """Prints an error in one line and exits with status 2. Of a machine's ranks only the first prints."""
    print_error(error)
    sys.exit(2)


def print_error(error):
    """One line, of the first rank that fails; of a failure that another rank tells of none."""
    if not isinstance(error, MainRankFailed) and is_first_to_fail():
        rank = f" (rank {os.environ['RANK']})" if os.environ.get('RANK', '0') != '0' else ''
        text = ' '.join(str(error).split())
        print(f'{os.path.basename(sys.argv[0])}{rank}: error: {text}', file=sys.stderr, flush=True)


def is_first_to_fail():
    """Whether no other rank of this run on this machine has asked this before."""
    of_torchrun = os.environ.get('TORCHELASTIC_ERROR_FILE', '')  # FOLDER/LOCAL_RANK/error.json
    folder = os.environ.get(FAILED) or os.path.dirname(os.path.dirname(of_torchrun))
    if os.environ.get('WORLD_SIZE', '1') == '1' or not folder:
        return True
    try:
        os.close(os.open(os.path.join(folder, 'failed'), os.O_CREAT | os.O_EXCL))
    except OSError as error:
        return not isinstance(error, FileExistsError)  # rather twice than never
    return True
