"""What can end a run besides its own mistakes, and what the user is told: one table, without torch.

A failure that no row knows is a fault of the program and keeps its traceback.
"""

import json
import os
import re
import time
from collections.abc import Iterator

from configs.schema import RetrievalConfig

GPU_MEMORY = (  # torch's own error; what CUDA, Triton, cuBLAS and cuDNN raise when they find no room for their own
    r"OutOfMemoryError|CUDA.{0,20}out of memory|_STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling .cublasCreate|nable to find an engine to execute this computation"
)
RESUME = " A training run goes on from its last save with the same command and --resume auto."
CONSEQUENCE = "another process of this run has ended"
# First match counts. What matches: names of types and a pattern of the first line, in the error or in what caused it.
# What to say: {line} is the error's own first line, other names are keys of the config.
TABLE = (
    (
        GPU_MEMORY,
        "the GPU's memory is full at batch_size_train {batch_size_train}: lower it (it is the micro-batch: the method "
        "stays the same), or raise vit_ckpt_layer (with vit_grad_ckpt true), or set precision bf16; --dry_run finds "
        "the largest that fits. In an evaluation, lower batch_size_test or rerank_tokens. nvidia-smi shows other "
        "programs on this GPU." + RESUME,
    ),
    (
        r"Too many open files|received 0 items of ancdata",
        "too many open files: raise the limit in this shell with `ulimit -n 65536`, or lower num_workers "
        "{num_workers}." + RESUME,
    ),
    (
        r"Bus error|unable to (write to|open|resize|allocate) (file|shared memory).*(/torch_|shm)"
        r"|shared memory limit|No space left on device.*(/dev/shm|/torch_)|(/dev/shm|/torch_).*No space left on device",
        "the loader's workers have no room in shared memory (/dev/shm): start Docker with --shm-size=8g, or lower "
        "num_workers {num_workers}; num_workers 0 needs none." + RESUME,
    ),
    (
        r"MemoryError|can't allocate memory|not enough memory|Cannot allocate memory|std::bad_alloc",
        "this machine's memory is full: lower num_workers {num_workers} or batch_size_train {batch_size_train} (it is "
        "the micro-batch: the method stays the same), or close other programs." + RESUME,
    ),
    (
        r"DataLoader worker \(pid|Pin memory thread exited",
        "a process that loads images has died ({line}). The system may have ended it because memory ran out: lower "
        "num_workers {num_workers}; with num_workers 0 the cause is seen directly." + RESUME,
    ),
    (
        r"No space left on device|Disk quota exceeded",
        "{line}. Make room on that disk: what was saved before is whole and stays." + RESUME,
    ),
    (
        r"RuntimeError.*(Connection (closed|reset) by peer|remote process exited|Broken pipe|failed to recv)",
        CONSEQUENCE + " ({line}): its message says why." + RESUME,
    ),
    (
        r"DistNetworkError|DistStoreError|Gloo connectFullMesh",
        "{line}. The processes of this run do not reach one another: look at --rdzv_endpoint or MASTER_ADDR and "
        "MASTER_PORT; another run may use that port." + RESUME,
    ),
    (
        r"DistBackendError|AcceleratorError|CUDA error|CUDA driver|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|NCCL error",
        "{line}. This comes from the GPU, its driver, or the connection between GPUs, not from the config: see "
        "whether nvidia-smi and a line of PyTorch on that GPU work, and restart the machine if not." + RESUME,
    ),
)
OURS = r"device-side assert"  # an index out of range, say: a fault of the program, whatever the driver calls it
PATIENCE_SECONDS = 2.0  # for the process with the reason to end first: the launcher then ends the others


def explain(error: BaseException, cfg: RetrievalConfig | None) -> str:
    """The paragraph for an error, '' for one that nobody foresaw; `cfg` is None while there is none."""
    if isinstance(error, ValueError):
        return own_words(error)  # written for the user where it was raised
    texts = described(error)
    for pattern, words in TABLE:
        if any(re.search(pattern, text) for text in texts) and not any(re.search(OURS, text) for text in texts):
            keys = {key: getattr(cfg, key, "") for key in ("batch_size_train", "num_workers")}
            return words.format(line=first_line(error).rstrip("."), **keys)
    return own_words(error) if isinstance(error, OSError) else ""


def gpu_memory_is_full(error: BaseException) -> bool:
    return any(re.search(GPU_MEMORY, text) for text in described(error))


def described(error: BaseException) -> list[str]:
    """Names of types and first line, of the error and of what it was raised from."""
    return [" ".join([*kinds(each), first_line(each)]) for each in chain(error)]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def kinds(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def own_words(error: BaseException) -> str:
    """The message, without the traceback that a loader's worker puts around it."""
    _, in_worker, traceback = str(error).rpartition("Original Traceback (most recent call last):")
    if not in_worker:
        return str(error)
    last = re.split(r"^[\w.]+(?:: |$)", traceback, flags=re.MULTILINE)[1:]  # a traceback's own lines are indented
    return last[-1].strip() if last else traceback.strip()


def first_line(error: BaseException) -> str:
    return (own_words(error).splitlines() or [""])[0].strip() or type(error).__name__


# ---- under the launcher ---------------------------------------------------------------------------------------------


def tell_launcher(paragraph: str) -> None:
    """Have torch.distributed.run close with these words, in the box it prints last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": paragraph, "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def let_another_speak() -> None:
    """Wait for the process that names the reason: the launcher shows what ended first, and ends the others."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        time.sleep(PATIENCE_SECONDS)
