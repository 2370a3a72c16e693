"""A report made up from known figures."""

from hf_sparse_pathways.ffn.execution import Execution
from hf_sparse_pathways.measure.speed.arms import Arm, ResidentCopies
from hf_sparse_pathways.measure.speed.report import BenchmarkReport
from hf_sparse_pathways.measure.speed.results import Timing
from hf_sparse_pathways.measure.speed.shares import TimeShares
from hf_sparse_pathways.measure.speed.switching import SwitchCost
from hf_sparse_pathways.measure.speed.workloads import Workload

DENSE = Arm(label="dense")
PLUGIN = Arm(label="plug-in, no domain", executor="compact")
PACKED = Arm(label="packed, dense", executor="packed", partner="packed, dense")
COMPACT = Arm(label="compact, law", executor="compact", pathway="law", sparsity=0.5, removed=0.5)
FAST = Arm(
    label="packed, law",
    executor="packed",
    pathway="law",
    sparsity=0.5,
    removed=0.4,
    partner="packed, dense",
)
ARMS = (DENSE, PLUGIN, PACKED, COMPACT, FAST)
RATES = {
    "dense": (10.0, 20.0, 40.0),
    "plug-in, no domain": (10.0, 20.0, 32.0),
    "packed, dense": (20.0, 20.0, 80.0),
    "compact, law": (12.0, 25.0, 48.0),
    "packed, law": (25.0, 25.0, 100.0),
}
SHARES = {
    "dense": TimeShares(ffn=0.5, attention=0.25, head=0.125, seconds=0.1),
    "packed, dense": TimeShares(ffn=0.25, attention=0.5, head=0.125, seconds=0.05),
}


def timing(kind="decode", batch=1, tokens=16):
    return Timing(
        workload=Workload(kind=kind, batch=batch, tokens=tokens),
        new_tokens=8 if kind == "decode" else None,
        rates=RATES,
        shares={} if kind == "ffn" else SHARES,
    )


REPORT = BenchmarkReport(
    base="some/tiny",
    dtype="float32",
    device="cpu",
    threads=1,
    weights=1000,
    auto=Execution("compact", "nothing faster is there."),
    arms=ARMS,
    unavailable={"sliced": "the neurons lie in too many runs"},
    notes=("a note",),
    timings=(timing(), timing(batch=4), timing("prefill", tokens=128), timing("ffn", tokens=128)),
    switches=(SwitchCost(executor="compact", first="law", second=None, seconds=(0.001, 0.003)),),
    copies=(ResidentCopies(executor="compact", pathway="law", bytes=500, seconds=0.25),),
    seconds=61.0,
)
