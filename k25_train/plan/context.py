"""How ranks that share sequences exchange latents: what is planned to be faster, among what fits; torch-free.

All-gathered, latents are waited for, and all keys and values of a sequence are held at a time; a ring hides
its exchange behind attention, of which the blocks' outputs have to be merged.
"""

from dataclasses import dataclass, replace

from k25_train.config.schema import Config
from k25_train.plan.memory.room import Fit, room_of
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.passes import pass_times
from k25_train.units import GB
from parallel.config import ContextExchange


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangePlan:
    """One way to exchange latents, planned."""

    exchange: ContextExchange
    """The way."""
    seconds: float
    """A micro-batch, forward and backward, in the chunk that takes longest."""
    left_bytes: float | None
    """What the fullest device has left; None where the device is the CPU."""
    fit: Fit
    """How it fits devices."""


def exchange_of(config: Config) -> ContextExchange | None:
    """How the ranks of a sequence exchange latents: as configured, or what is planned to be best; None where
    ranks have whole sequences."""
    sizes = config.parallelism
    if sizes.cp == 1 or sizes.cp_exchange is not None:
        return sizes.cp_exchange
    return best_of(exchange_plans(config)).exchange


def with_exchange(config: Config) -> Config:
    """The configuration with the exchange that it amounts to, which plans are made of."""
    return replace(config, parallelism=replace(config.parallelism, cp_exchange=exchange_of(config)))


def exchange_plans(config: Config) -> list[ExchangePlan]:
    """Every way to exchange latents."""
    return [_planned(config, exchange) for exchange in ContextExchange]


def best_of(plans: list[ExchangePlan]) -> ExchangePlan:
    """The fastest that fits, or is tight if none does; if nothing has room, what misses by the least."""
    for fit in (Fit.fits, Fit.tight):
        found = [plan for plan in plans if plan.fit is fit]
        if found:
            return min(found, key=lambda plan: plan.seconds)
    return max(plans, key=lambda plan: plan.left_bytes or 0.0)


def reason_of(config: Config) -> str:
    """Why the exchange is what it is, as a line of text; empty where ranks have whole sequences."""
    sizes = config.parallelism
    if sizes.cp == 1:
        return ""
    plans = {plan.exchange: plan for plan in exchange_plans(config)}
    own = exchange_of(config) or ContextExchange.ring
    (other,) = [plan for exchange, plan in plans.items() if exchange is not own]
    by = plans[own].seconds / other.seconds - 1
    text = f"{own.value}: passes take {abs(by):.1%} {'less' if by < 0 else 'more'} than with "
    text += other.exchange.value
    left_gb = (other.left_bytes or 0.0) / GB
    if other.fit is Fit.does_not_fit:
        text += f", which lacks {-left_gb:.1f} GB"
    elif other.fit is Fit.tight:
        text += f", which leaves {left_gb:.1f} GB"
    return text


def _planned(config: Config, exchange: ContextExchange) -> ExchangePlan:
    pipeline = plan_pipeline(replace(config, parallelism=replace(config.parallelism, cp_exchange=exchange)))
    room = room_of(pipeline)
    return ExchangePlan(
        exchange=exchange,
        seconds=_micro_batch_s(pipeline),
        left_bytes=room.device_left,
        fit=room.of_device,
    )


def _micro_batch_s(pipeline: PipelinePlan) -> float:
    """A micro-batch through the chunk that takes longest, forward and backward."""
    passes = pass_times(pipeline)
    return max(passes.pair_s(chunk, chunk) for chunk in range(passes.num_chunks))
