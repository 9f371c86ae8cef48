"""The public surface: every name has a reason, and is documented with all that a user needs."""

import dataclasses
import importlib
import inspect
import re

import pytest

MODULES = (
    "",
    "basis",
    "curvature",
    "diagnose",
    "experimental",
    "inner",
    "least_squares",
    "online",
    "online.streams",
    "online.trackers",
    "plot",
    "spectral",
    "spectral.operators",
    "training",
)


def module(name):
    return importlib.import_module(f"lowrank_optax.{name}".rstrip("."))


def names_of(name):
    """What a module offers."""
    where = module(name)
    own = [n for n, x in vars(where).items() if getattr(x, "__module__", None) == where.__name__]
    return getattr(where, "__all__", None) or [n for n in own if not n.startswith("_")]


def public():
    """Every public class and function once, by the shortest name that it has."""
    seen = {}
    for name in MODULES:
        for n in names_of(name):
            x = getattr(module(name), n)
            if inspect.isclass(x) or inspect.isfunction(x):
                seen.setdefault(x, f"{name}.{n}".lstrip("."))
    return {name: x for x, name in seen.items()}


PUBLIC = public()


def kind(x):
    """What an object is to a reader: a record of results, something to implement, or to use."""
    if inspect.isclass(x) and issubclass(x, tuple):
        return "record"
    if inspect.isabstract(x) or getattr(x, "_is_protocol", False):
        return "interface"
    return "part" if inspect.isclass(x) else "function"


def documented(x):
    """The docstring of a class with those of the classes that it extends."""
    if not inspect.isclass(x):
        return inspect.getdoc(x) or ""
    return "\n".join(
        inspect.cleandoc(c.__doc__ or "") for c in x.__mro__ if "lowrank" in c.__module__
    )


def fields(x):
    """The names that a caller passes, or that a record has."""
    if kind(x) == "record":
        return x._fields
    if dataclasses.is_dataclass(x):
        return [f.name for f in dataclasses.fields(x) if f.init]
    names = inspect.signature(x).parameters.values()
    return [p.name for p in names if p.name not in ("self", "args", "kwargs")]


def missing(x):
    """What a reader would look for in vain."""
    text, what = documented(x), kind(x)
    lines = [line.strip() for line in text.splitlines()]
    named = {m for line in lines for m in re.findall(r"^\*{0,2}([\w, *]+):", line)}
    named = {n.strip(" *") for names in named for n in names.split(",")}
    out = [f"`{name}` in Args or Attributes" for name in fields(x) if name not in named]
    own = inspect.getdoc(x) or ""
    wanted = {
        "record": (),
        "interface": (),
        "part": ("Example:", "Cost:", "Source:", "Raises:"),
        "function": ("Example:", "Returns:"),
    }[what]
    source = inspect.getsource(x)
    for section in wanted:
        if section == "Raises:" and "__post_init__" not in vars(x):
            continue
        if not re.search(rf"(?m)^{section}", own):
            out.append(section)
    if what == "function" and re.search(r"\b(check\w*|raise)\b", source) and "Raises:" not in own:
        out.append("Raises:")
    if "Example:" in wanted and ">>>" not in own:
        out.append("a doctest")
    return out


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_object_is_documented(name):
    assert not missing(PUBLIC[name]), f"{name} lacks {', '.join(missing(PUBLIC[name]))}"


# Why a name is public: what somebody types it for. A name that fits no reason has no place here.
REASONS = {
    "": {
        "an optimizer by the name that people know": "adahessian full_matrix_adam galore "
        "gauss_newton ggt kl_shampoo kl_soap levenberg_marquardt lowrank_newton lre muon "
        "natural_gradient normuon shampoo soap soap_muon sophia_h spring whiten whitened_adam",
        "the engines, for combinations without a name": "scale_by_kronecker scale_by_lre "
        "scale_by_matrix_lre",
        "transformations that stand behind any optimizer": "orthogonalize scale_by_neuron_rms",
        "what parts are made of": "basis curvature inner",
        "other halves of the library": "diagnose least_squares online spectral",
        "what the original has and nothing recommends": "experimental",
        "laws, for the state of an inner part from outside": "Law MATRIX MOMENTS SCALAR "
        "SECOND_MOMENT TENSOR THIRD_MOMENT VECTOR Inner",
        "what parts from outside take and return": "BasisUpdate Columns Context Correction "
        "Eigenbasis Layout Outside SymmetricCorrection Vector",
        "states, to read and to restore": "Events GroupState LevenbergMarquardtState Metrics "
        "ScaleByLREState ScaleByMatrixLREState Sides SpringState",
        "how leaves are grouped, viewed and placed": "MatrixAxes default_matrix_view per_leaf "
        "shardings",
    },
    "basis": {
        "windows of the last columns": "CommonDirections GGT LowRankFactor",
        "averages of all columns": "Eigen FrequentDirections FullMatrix HistoryPCA Nystrom "
        "RandomizedEigen SubspaceIteration",
        "subspaces that move by a rule": "GROUSE Hebbian OPAST",
        "subspaces that are drawn or chosen": "Histogram Random RandomPermutation TopK "
        "WeightedPermutation",
        "choices inside these": "AdaptiveRule CayleyAdamG DropOldest DropSmallest GradientRule "
        "Reconstruct StiefelRule",
        "to write one": "Basis Frame Overflow Regularized Rule Seen TruncatedEigen Turn",
    },
    "curvature": {
        "of gradients": "Covariance GradientEMA",
        "of the Hessian": "BFGS HutchinsonHessian SR1 ShorR SquaredHessian",
        "of examples and residuals": "EmpiricalFisher GaussNewton",
        "probes and products of Hessians": "CentralDifference ExactProduct ForwardDifference "
        "GradientDifference GradientProbe MixedProbe NormalProbe RademacherProbe StepProbe",
        "of matrices": "SideCovariance",
        "to write one": "Curvature Evidence Observation SideColumns SideCurvature",
    },
    "diagnose": {
        "what an optimizer is made of, and how it sees leaves": "parts views LeafView LeafViews",
        "what it keeps and did": "matrices operator scalars summary MatricesSummary "
        "OperatorSummary Summary",
        "what it will need": "Memory memory",
        "single figures of it": "effective_rank find orthogonality_error",
    },
    "experimental": {
        "what the original has and nothing recommends": "CovarianceTimesLoss Parameters "
        "UnrolledGaussNewton Updates",
    },
    "inner": {
        "optimizers by the name that people know": "Adam CubicNewton EMA Lion NaturalGradient",
        "with full matrices or third moments": "CubicAdam FullMatrixAdam ThirdOrder",
        "with a probe's product": "FullMatrixBFGSAdam FullMatrixHutchinsonAdam HutchinsonAdam",
        "powers of the curvature": "DampedLeastSquares LInv LInvSqrt LPower",
        "shapes of an update": "Cautious ClipNorm ClipNormByEMA ClipValue CopyGradSign NanToZero "
        "Normalize RMSProp Sign",
        "to combine them": "Chain Optax as_inner",
    },
    "least_squares": {
        "residuals with their gradients": "PointResiduals at_points energy_residuals",
        "what counts how much": "attention_weights causal_weights hard_constraint resample",
    },
    "online": {
        "operators, and learning them": "Learned Operator composite learner merge signed_pca",
        "purposes": "Activation Avoidance Custom Dynamics EditLocality Entropy OldTask "
        "Reconstruction Whitening",
        "states and what they take": "Batch Info Learner LearnerState",
        "to write a purpose": "Pairs Purpose Stream Terms View",
        "where vectors come from, and simpler rules": "streams trackers",
    },
    "online.streams": {
        "vectors of a network": "activations fisher_vector_products gradients "
        "hessian_vector_products per_example_gradients sensitivities",
    },
    "online.trackers": {
        "rules by their published names": "CCIPCA EigenGame NoisyPower PAST PETRELS Sanger ada_oja "
        "brand frequent_directions grouse history_pca krasulina oja opast",
        "a basis as a tracker": "FromBasis",
        "to write one": "OnRows Tracker TrackerState",
    },
    "plot": {
        "a picture each": "accuracy captured_energy loss spectrum training",
        "names beside curves": "label_ends",
    },
    "spectral": {
        "to run": "Decomposition Network fit",
        "methods by their published names": "ALLO DPNet ExcitedStates Krasulina LowRankProduct "
        "NestedLoRA NeuralEF NoisyPower Oja OrbitalMinimization SpIN SpectralNet VAMP2 "
        "VariationalEnergy",
        "choices inside these": "AlphaPenalty Estimate Halves JointNesting MuPenalty Nesting "
        "Penalty SequentialNesting SquaredPenalty TracePenalty UStatistic Unnested WholeBatch",
        "to write one": "Method MomentLoss MomentMethod SideMoments surrogate",
        "figures of merit": "align angles blocks relative_error subspace_distance vamp_score",
        "derivatives": "Jet laplacian",
        "what is decomposed": "operators",
    },
    "spectral.operators": {
        "of physics": "FokkerPlanck Langevin Schrodinger",
        "of data": "CanonicalDependence GraphLaplacian KernelIntegral Koopman Matrix "
        "NeuralTangentKernel RectangularMatrix",
        "potentials": "DoubleWell Harmonic Hydrogen InfiniteWell MultiScale Potential Prinz",
        "points to sample at, and their boundary": "Box BoxMask Proposal RootMask classical "
        "gaussian geometric",
        "from trajectories to pairs and back to times": "lagged_pairs timescales",
        "to write one": "SampledOperator",
    },
    "training": {"flax's state, with extra arguments": "TrainState"},
}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_reason(name):
    given = [n for names in REASONS[name].values() for n in names.split()]
    assert len(set(given)) == len(given)
    assert set(given) == set(names_of(name))
