"""`coalm doctor --expect-cluster`: the pieces that GPU training on a cluster needs beyond a laptop's."""

from __future__ import annotations

from coalm_nemo.diagnosis import FOUND, REQUIRED, Diagnosis, Finding, wrong_version

GPU_PIECES = {
    "NCCL": "ranks on GPUs talk over it; a CUDA build of torch has it",
    "Transformer Engine": "GPU training and FP8 need it",
    "Apex": "the cluster's image has NVIDIA's build with its CUDA extensions",
}
"""Row of the doctor's table -> what it is for."""


def missing_pieces(diagnosis: Diagnosis, gpus: int = 0) -> list[str]:
    """A sentence for each piece that is missing, broken or of the wrong version, and one if torch sees fewer GPUs.

    With no GPU in sight (an image is built without one) compiled pieces are looked for, not loaded.
    """
    found = {f.name: f for f in diagnosis.findings}
    sentences = [_sentence(found[name]) for name in (*REQUIRED, *GPU_PIECES)]
    return [s for s in (*sentences, _gpus(found["GPUs"], gpus)) if s]


def _sentence(finding: Finding) -> str:
    if finding.state != FOUND:
        why = GPU_PIECES.get(finding.name) if not finding.version else None  # a broken piece tells its own story
        return f"{finding.name} is {finding.state}: {why or finding.meaning}."
    if finding.name == "Transformer Engine" and (asked := wrong_version("transformer-engine", finding.version)):
        return f"Transformer Engine is {finding.version}: coalm_nemo wants {asked}."
    return ""


def _gpus(finding: Finding, expected: int) -> str:
    seen = int(finding.version or 0)
    return f"torch sees {seen} of {expected} GPUs: {finding.meaning}." if seen < expected else ""


def report(diagnosis: Diagnosis, missing: list[str]) -> str:
    """What `coalm doctor --expect-cluster` says below its table."""
    if missing:
        return "\n".join(f"coalm doctor: {sentence}" for sentence in missing)
    if any(f.name == "GPUs" and f.state == FOUND for f in diagnosis.findings):
        return "coalm doctor: the cluster's pieces are all there, and load."
    return (
        "coalm doctor: the cluster's pieces are all there. No GPU is seen here, so none was loaded; "
        "on a node: coalm doctor --expect-cluster --expect-gpus 8"
    )
