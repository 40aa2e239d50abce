"""
How a program ends: an error that the user can fix prints one line and exits with code 2, a signal
prints one line, and only a bug of ours prints a traceback.
"""
import contextlib
import errno
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from formats.files import InputError


class Stopped(Exception):
    """Somebody asked the run to end: args are the signal's number and what is saved."""


def launch(main, args):
    """Return main(args), or end the program in one line on stderr. The exit code of a signal is
    128 + its number."""
    for stream in (sys.stdout, sys.stderr):     # a name that this terminal cannot show is escaped
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        result = main(args)
        if joined():
            dist.destroy_process_group()
        return result
    except Stopped as stopped:
        code, message = 128 + stopped.args[0], stopped.args[1]
    except KeyboardInterrupt:                   # where no Progress handles signals
        code, message = 128 + signal.SIGINT, "stopped; there is nothing to save"
    except (InputError, FloatingPointError) as error:
        # an error from a data process begins with its traceback: take the text after it
        text = str(error).strip().rpartition("formats.files.InputError: ")[2]
        code, message = 2, f"error: {' '.join(text.splitlines())}"
    except OSError as error:
        full = "; raise `ulimit -n`, or take fewer --workers" * (error.errno == errno.EMFILE)
        code = 2
        message = f"error: {error.filename or 'input or output'}: {error.strerror or error}{full}"
    except (RuntimeError, MemoryError) as error:
        if not (message := explained(error)):
            raise
        code, message = 2, f"error: {message}"
    last_word(message)
    sys.exit(code)


def joined():
    """Whether this process is one of several. (Some builds of torch lack torch.distributed.)"""
    return dist.is_available() and dist.is_initialized()


def explained(error):
    """What a RuntimeError or MemoryError means for the user; None if it may be a fault of ours."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else ""
    if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in text:
        return f"the GPU's memory is full ({first[:120]}); lower --batch-size or the sizes"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"main memory is full ({first[:160]}); lower --batch-size, or take smaller photos"
    if re.search("for the MPS device|MPS: Unsupported", text):
        return f"Apple's GPU lacks an operation ({first[:120]}); --device cpu, or set " \
            "PYTORCH_ENABLE_MPS_FALLBACK=1"
    if "no kernel image" in text:
        return "this torch was not built for this GPU, see torch.cuda.get_arch_list(): install a " \
            "build of torch that was, or take --device cpu"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed ({first[:120]}); --no-compile goes on without"
    if "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return f"a data process has ended ({first[:120]}); was memory full? Try --workers 0"
    if joined() and ("gloo" in text or isinstance(error, dist.DistBackendError)):
        last = text.strip().splitlines()[-1][:200]
        return f"the processes lost each other ({last}); if one has ended, its message says why"
    if "RANK" in os.environ and not joined() and re.search("(?i)gloo|nccl|connect|timeout", text):
        return f"torchrun: the processes cannot join ({first[:160]}); on several machines " \
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between them, as eth0"
    return None


def last_word(message):
    """Print the line on stderr, once for all processes of a machine, and under torchrun once more
    below the long report that it writes when a process fails."""
    torchrun = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ or not hasattr(os, "fork"):
        print(message, file=sys.stderr, flush=True)
        return
    words = torchrun, os.environ["TORCHELASTIC_RUN_ID"], os.environ.get("MASTER_PORT"), \
        os.environ.get("TORCHELASTIC_RESTART_COUNT")
    claim = Path(tempfile.gettempdir(), "nanoglid-" + "-".join(map(str, words)))
    with contextlib.suppress(OSError):          # a claim of an earlier run with equal numbers
        if time.time() - claim.stat().st_mtime > 60:
            claim.unlink()
    try:
        claim.open("x").close()
    except FileExistsError:                     # another process has said it
        return
    except OSError:
        pass
    # one write, on a line of its own: another process may be in the middle of its progress bar
    print(f"\n{message}\n", end="", file=sys.stderr, flush=True)
    if os.fork() == 0:
        try:
            os.setsid()                         # torchrun kills our process group: leave it
            os.closerange(3, 4096)              # close the pipes that others read, and GPUs
            while running(torchrun):
                time.sleep(0.05)
            os.write(2, f"{message}\n".encode(errors="backslashreplace"))
        finally:
            claim.unlink(missing_ok=True)
            os._exit(0)


def running(process):
    """Whether a process is alive, by Linux's /proc; False on other systems."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
