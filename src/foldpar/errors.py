"""The exceptions of foldpar: one small tree, each also a subclass of the built-in one that callers expect."""

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CollectiveError",
    "FamilyError",
    "FoldingError",
    "GradientError",
    "GroupsError",
    "LayoutError",
    "ModelError",
    "ReplicaError",
    "ShapeError",
    "ShardingError",
]


class FoldingError(Exception):
    """The root of the tree: ``except FoldingError`` catches whatever foldpar raises on purpose."""


class ArgumentError(FoldingError, TypeError):
    """An argument of a wrong kind: two that are swapped, a layout for groups, parameters for a model."""


class LayoutError(FoldingError, ValueError):
    """A layout that cannot be, or a question that it cannot answer: degrees, axes, coordinates, ranks, orders."""


class GroupsError(FoldingError, RuntimeError):
    """Process groups that cannot be made or used: another world, ranks that disagree, no such mesh, destroyed."""


class ShapeError(FoldingError, ValueError):
    """A tensor of a wrong shape, dtype or device, or row counts that do not add up."""


class FamilyError(FoldingError, ValueError):
    """A parameter without a family, or with contradicting ones: its gradient reduction would be a guess."""


class GradientError(FoldingError, RuntimeError):
    """Gradients that are not in the state that a step needs: not reduced, reduced twice, or of other parameters."""


class CollectiveError(FoldingError, RuntimeError):
    """A collective failed on this rank; the text names the axis and the collective."""


class ReplicaError(FoldingError, RuntimeError):
    """Values that must be equal on several ranks differ, or a lane gradient is not what was declared."""


class ShardingError(FoldingError, RuntimeError):
    """A model that cannot be sharded as asked, or whose shards are not in the state that a call needs."""


class CheckpointError(FoldingError, RuntimeError):
    """A checkpoint that cannot be written or read: incomplete, damaged, of another model, or the disk failed."""


class ModelError(FoldingError, ValueError):
    """A model that cannot be folded as it is: an unknown block or tensor-parallel style, or folded already."""
