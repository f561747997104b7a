"""Bytes that layers keep for the backward pass, and the workspace of single operations. No torch.

Counted is what layers and kernels allocate: `model/`, the torch form of the kernels (`kernels/*/torch.py`) on a CPU,
the Triton form on a GPU. If they change, this file changes; `tests/integration/test_memory_measured.py` and
`benchmarks/memory.py` compare it with measured peaks. Letters as in `planning/job.py`; e bytes per element.
"""

from __future__ import annotations

from exlm_dist.config import vocab_tiles
from exlm_dist.model.cost import learns_transitions
from exlm_dist.planning.job import FP32, INT64, Job, Stage

FP64 = 8
#: Elements that the torch form works on at a time: `BLOCK_ELEMENTS` of attention, transitions and feed-forward.
BLOCK = 1 << 19
#: Bytes that oneDNN keeps of a compiled product (measured: 0.58 to 0.63 MiB); on an Intel processor it computes none.
PRODUCT = 600 << 10


def block_input(job: Job) -> float:
    """Hidden states between two blocks, [T, D]: all that is kept of a recomputed block."""
    return job.tokens * job.element * job.model.width / job.along_tokens


def embedding(job: Job) -> float:
    """Output of the embedding, its dropout mask if there is one, and the rotary angles, the same for all blocks."""
    angles = FP32 * job.tokens * job.head_width / 2 * (3 if job.gpu else 1)  # on a GPU also cosines and sines
    return block_input(job) + _mask(job, job.tokens) + angles


def block(job: Job) -> float:
    """All that a block keeps, with its output but without its input."""
    return attention_part(job) + attention_output(job, job.tokens) + feed_forward_part(job, job.tokens)


def last_block(job: Job) -> float:
    """The same of the last block of the model, which continues with only the states after its attention."""
    return attention_part(job) + attention_output(job, job.states) + feed_forward_part(job, job.states)


def attention_part(job: Job) -> float:
    """First norm with its mean and deviation; q, k and v; on a GPU also the output and one lse per head."""
    width, element, tensor = job.model.width, job.element, job.tensor
    norm = job.tokens * (element * width + 2 * FP32) / job.along_tokens
    heads = job.tokens * element * 3 * width / tensor
    if job.gpu:
        heads += job.tokens * (element * width + FP32 * job.model.heads) / tensor
    return norm + heads


def attention_output(job: Job, rows: float) -> float:
    """Input of the output projection (on a GPU kept by the attention already, unless only some rows continue)."""
    if job.gpu and rows == job.tokens:
        return 0.0
    return rows * job.element * job.model.width / job.tensor


def feed_forward_part(job: Job, rows: float) -> float:
    """Residual sum after the attention, second norm, feed-forward before its gelu, sum after it, two dropout masks."""
    width, element = job.model.width, job.element
    sums = rows * (element * 3 * width + 2 * FP32) / job.along_tokens
    return sums + rows * element * job.model.ffn / job.tensor + 2 * _mask(job, rows)


def feed_forward_work(job: Job, rows: float) -> float:
    """Backward pass of the feed-forward: gradients of the stream, its branch and the input of the gelu, a workspace."""
    width, element = job.model.width, job.element
    stream = rows * element * width * (2 if job.model.dropout else 1) / job.along_tokens
    inner = rows * element * job.model.ffn / job.tensor
    if job.gpu:
        return stream + 2 * inner
    return stream + inner + 2 * FP32 * min(BLOCK, rows * job.model.ffn)


def attention_work(job: Job) -> float:
    """Backward pass of the attention: gradients of the stream, of its output and of q, k and v, and a workspace."""
    width, element, tensor = job.model.width, job.element, job.tensor
    stream = job.tokens * element * width / job.along_tokens
    gradients = job.tokens * element * width / tensor
    if job.gpu:  # of the output and of q, k, v; rotated keys; one lse per head
        return stream + 5 * gradients + FP32 * job.tokens * job.model.heads / tensor
    rotation = FP32 * job.tokens * job.head_width / 2 * 5
    heads, squared = job.model.heads / tensor, job.sizes.expanded**2
    sequences = min(job.config.batch.micro, max(1, BLOCK // (heads * squared)))
    # Factors of the dropout of a block, and four arrays like the weights of a sequence.
    weights = FP32 * heads * squared * (4 + (sequences if job.model.attention_dropout else 0))
    rotated = 2 * FP32 * job.tokens * width / tensor
    return stream + gradients + 3 * gradients + rotated + rotation + weights


def head(job: Job) -> float:
    """What the norm and the output layer keep: norms, dense map, gelu, queries and keys at the states."""
    width, element = job.model.width, job.element
    kept = job.states * (4 * element * width + 4 * FP32)
    if learns_transitions(job.model):
        kept += job.states * element * (2 * width + job.model.heads) / job.tensor
        kept += 2 * FP32 * job.states * job.model.heads / job.tensor if job.gpu else 0
    return kept


def graph(job: Job) -> float:
    """Scores of the targets at the states, transitions, forward variables; logits, if the kernel keeps some."""
    pairs, transitions = job.pairs, job.transitions
    if job.gpu:
        kept = FP32 * pairs
    else:
        kept = pairs * (INT64 + FP32 + 1) + logits_kept(job)
    if job.model.objective == "exlm":
        kept += pairs * (FP32 if job.gpu else 2 * FP64) + FP32 * transitions
    return kept


def logits_kept(job: Job) -> float:
    """Logits of the first chunks of rows, up to a budget."""
    return FP32 * job.vocabulary * _rows_kept(job)


def _rows_kept(job: Job) -> float:
    rows, step = job.states, _chunk(job)
    within = vocab_tiles.KEEP_ELEMENTS // job.vocabulary
    return rows if rows <= within else within // step * step


def output_work(job: Job) -> float:
    """Largest workspace of the output layer: of the recursion over the graph, the transitions or the logits."""
    return max(_graph_work(job), _transition_work(job), _logits_work(job))


def _graph_work(job: Job) -> float:
    pairs, transitions = job.pairs, job.transitions
    if job.model.objective == "mlm":
        return 3 * FP32 * pairs
    if job.gpu:
        return FP32 * (2 * pairs + 2 * transitions)
    return pairs * 4 * FP64 + transitions * (FP32 + 2 * FP64 + FP32)


def _transition_work(job: Job) -> float:
    if not learns_transitions(job.model):
        return 0.0
    transitions, heads = job.transitions, job.model.heads / job.tensor
    gradients = 2 * job.states * job.model.width / job.tensor
    if job.gpu:
        return FP32 * (transitions + 2 * job.states * heads) + job.element * gradients
    squared = heads * job.longest[1] ** 2
    block = squared * min(job.config.batch.micro, max(1, BLOCK // squared))
    return FP32 * (transitions + gradients + 5 * block)


def _logits_work(job: Job) -> float:
    """Two chunks of logits, gradients of the features, and the gradient of the matrix before it is returned; on a CPU
    chunks of logits that are not kept, and also features and matrix with a column for the bias."""
    matrix, features = job.vocabulary * job.model.width, job.states * job.model.width
    if job.gpu:
        return job.element * matrix + FP32 * features + max(_gradient_work(job), job.element * features)
    copies = 0 if job.element == FP32 else 2
    chunks = min(2 * _chunk(job), job.states - _rows_kept(job)) * job.vocabulary
    return FP32 * (chunks + (2 + copies) * matrix + 3 * features)


def _gradient_work(job: Job) -> float:
    """Triton form: gradients of a block of rows by a chunk of words, sums for the bias over each tile of rows, and, if
    there are several blocks, the sum of a chunk's gradient over them."""
    few = job.states <= vocab_tiles.FEW_ROWS
    words = _part(job.vocabulary, vocab_tiles.WORDS_OF_FEW if few else vocab_tiles.WORDS_OF_MANY)
    rows = _part(job.states, vocab_tiles.LOGITS // words)
    tiles = -(-rows // (vocab_tiles.TILE if job.element < FP32 else vocab_tiles.TILE // 2))
    total = words * job.model.width if rows < job.states else 0
    return job.element * rows * words + FP32 * (tiles * job.vocabulary + total)


def _part(total: float, most: float) -> float:
    """The total, if that is at most `most`; else the size, in whole tiles, of the fewest equal parts that are."""
    tile = vocab_tiles.TILE
    tiles = -(-total // tile)
    return total if total <= most else -(-tiles // -(-tiles // (most // tile))) * tile


def _chunk(job: Job) -> int:
    return max(1, vocab_tiles.CHUNK_ELEMENTS // job.vocabulary)


def compiled_products(job: Job, stage: Stage) -> float:
    """On a CPU: what oneDNN keeps of the products that it has compiled, one for each shape of the operands.

    Counted are the products whose shapes depend on the sizes of a micro-batch: forward and two gradients of each map.
    Another T or S compiles them again, up to the 1,024 that oneDNN keeps; a `data.bucket` makes shapes repeat.
    """
    if job.gpu:
        return 0.0
    maps = 1 if job.tensor > 1 else 4  # of a block; megatron's layers multiply in another way
    count = maps if stage.blocks > stage.last else 0
    if stage.last:
        count += maps + 1  # the last block, the dense map and the last chunk of the vocabulary
        count += 4 if learns_transitions(job.model) else 0
    return 3 * count * PRODUCT


def _mask(job: Job, rows: float) -> float:
    """A byte per element if there is dropout; the Triton form draws the mask again instead."""
    return rows * job.model.width / job.along_tokens if job.model.dropout and not job.gpu else 0.0
