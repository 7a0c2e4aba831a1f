"""What every evaluation asks of two programs: sites in the plate of the datapoints, the same in both."""

from __future__ import annotations

from pyro import poutine
from torch.distributions import Categorical

from vma_pyro.infer.engine.checks import check_same_latents
from vma_pyro.infer.engine.masks import check_same_power, without_mask
from vma_pyro.infer.engine.plates import Site, sample_sites

BATCH_PLATES = ("data",)


def check_plate(site: Site, datapoints: int) -> None:
    """Refuse a plate `data` of another size than there are datapoints."""
    for frame in site["cond_indep_stack"]:
        if frame.name in BATCH_PLATES and frame.size != datapoints:
            raise ValueError(
                f"x: expected {frame.size} datapoints, as plate '{frame.name}' of site '{site['name']}' has, "
                f"got {datapoints}"
            )


def check_pair(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    """Model and guide draw the same sites, but for the base of an autoguide's values."""
    check_same_latents(model_trace, guide_trace)
    check_same_power(model_trace, guide_trace)
    for site in sample_sites(guide_trace):
        if site["is_observed"] or site["name"] not in model_trace:
            continue
        own, most = (_number_of_values(trace.nodes[site["name"]]) for trace in (guide_trace, model_trace))
        if own and most and own > most:
            raise ValueError(
                f"site '{site['name']}': expected at most {most} values in the guide as in the model, got {own}"
            )


def _number_of_values(site: Site) -> int | None:
    """Count the values of a categorical site."""
    fn = without_mask(site["fn"])
    return fn.logits.shape[-1] if isinstance(fn, Categorical) else None


def weigh(trace: poutine.Trace) -> None:
    """Compute log probabilities, and refuse those of another shape than the plates say."""
    try:
        trace.compute_log_prob()
    except ValueError as error:  # Pyro adds the values, and the shapes of all sites
        what, why = (str(part or "").partition("\n")[0] for part in (error, error.__cause__))
        raise ValueError(f"{what} {why}") from None
    for site in sample_sites(trace):
        _check_shape(site)


def _check_shape(site: Site) -> None:
    """Refuse a log probability with a dimension that is not of a plate."""
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    expected = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
    actual = list(site["log_prob"].shape)
    rank = max(len(expected), len(actual))
    if [1] * (rank - len(actual)) + actual != [1] * (rank - len(expected)) + expected:
        raise ValueError(
            f"site '{site['name']}': expected a log probability of shape {expected}, the draws and plates of the "
            f"site, got {actual}; declare what is more with to_event or a plate"
        )
