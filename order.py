"""The order of training: which sample comes when is a pure function of (seed, step, rank). There is no loader state to
save or to lose.

    samples = {"novel zh": 900, "web en": 100}
    phases = next_phase([], samples, places_of(samples, mix="web=3"))
    [(source, i)] = samples_at(0, 1, phases, seed=0)    # the first sample of the run is the i-th of this source

Each source, by its name and language, is a stream of its own: epoch after epoch of its samples, in each of which every
sample comes once, shuffled. A mix says how many places of a round each stream has; they are spread evenly.

A phase is what a run serves while neither its data nor its mix change:

    samples    {source: how many the data had}
    places     {source: its share of a round}; one for each sample where no mix is given
    first      the same of the first round, which after a change of the data is what the phase before has left, and more
    served     how many samples the phase has served
"""

import hashlib
import math
from fractions import Fraction

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# One stream


def data_order(i, n, seed):
    """A seeded bijection of [0, n), int or int array -> the same: the i-th sample of an epoch.

    A Feistel network of 6 rounds over the next power of four, walked along its cycle until it lands below n (Black and
    Rogaway 2002, section 4): O(1) memory at any n up to 2^62, as no permutation is stored.
    """
    i = np.asarray(i, dtype=np.uint64)
    if n < 1 or i.size and int(i.max()) >= n:
        raise ValueError(f"data_order: index outside of [0, {n})")
    half_bits = np.uint64(max(1, math.ceil(max(1, (n - 1).bit_length()) / 2)))
    low = np.uint64((1 << int(half_bits)) - 1)
    digest = hashlib.sha256(f"data order {seed}".encode()).digest()
    keys = np.frombuffer(digest[:24], dtype=np.uint32).astype(np.uint64)

    def permute(x):
        left, right = x >> half_bits, x & low
        for key in keys:
            # One multiplication and two shifts mix the bits well enough (constants of splitmix64).
            h = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((h >> np.uint64(32)) & low)
        return left << half_bits | right

    with np.errstate(over="ignore"):
        out = permute(i)
        while (outside := out >= n).any():
            out = np.where(outside, permute(out), out)
    return out.astype(np.int64) if out.ndim else int(out)


# A stream's history is [(samples, served), ...], an entry for each phase. Example: [(100, 30)]: of 100 samples 30 were
# served. 40 are added: [(100, 30), (140, 0)]. Now the 70 that are left of the old epoch and the 40 new ones come first,
# shuffled; from then on epochs of all 140.


def first_epoch(history):
    """How many samples the first epoch of the last phase has: those left of the phase before, and the new ones."""
    *before, (n, _) = history
    return left_over(before) + n - (before[-1][0] if before else 0)


def left_over(history):
    """How many samples the current epoch still has to serve."""
    if not history:
        return 0
    n, served = history[-1]
    first = first_epoch(history)
    return first - served if served < first else -(served - first) % n  # the rest of an epoch of n


def sample_of_stream(i, history, seed):
    """The number of the i-th sample that the last phase serves."""
    *before, (n, _) = history
    first = first_epoch(history)
    name = f"{seed} phase {len(before)}"
    if i >= first:
        epoch, in_epoch = divmod(i - first, n)
        return data_order(in_epoch, n, f"{name} epoch {epoch + 1}")
    mixed = data_order(i, first, f"{name} epoch 0")
    left = left_over(before)
    if mixed < left:  # one that the phase before would have served next
        return sample_of_stream(before[-1][1] + mixed, before, seed)
    return before[-1][0] + mixed - left if before else mixed


# ----------------------------------------------------------------------------------------------------------------------
# All streams of a run


def spread(places, n):
    """How many of the first n places of the endless repetition of a round belong to each source: a list of counts.

    The first source has its share of all places, rounded down, the second its share of what is left, and so on. So the
    counts of n and of n + 1 differ in one source, and after each round they are exact.
    """
    counts, total = [], sum(places)
    for own in places:
        counts.append(n * own // total if own else 0)
        n, total = n - counts[-1], total - own
    return counts


def counts_at(phase, n):
    """How many of the first n samples of a phase are each source's: {source: count}."""
    first, later = (list(phase[key].values()) for key in ("first", "places"))
    in_first = min(n, sum(first))
    counts = zip(spread(first, in_first), spread(later, n - in_first))
    return dict(zip(phase["places"], map(sum, counts)))


def source_histories(phases):
    """{source: its history}."""
    histories = {}
    for phase in phases:
        counts = counts_at(phase, phase["served"])
        for source, n in phase["samples"].items():
            if n:
                histories.setdefault(source, []).append((n, counts[source]))
    return histories


def samples_at(first, count, phases, seed):
    """Samples first, first + 1, ... that the last phase serves -> [(source, number among its samples)]."""
    histories, chosen, now = source_histories(phases), [], counts_at(phases[-1], first)
    for n in range(first + 1, first + count + 1):
        before, now = now, counts_at(phases[-1], n)
        source = next(name for name in now if now[name] > before[name])
        chosen.append((source, sample_of_stream(before[source], histories[source], f"{seed} {source}")))
    return chosen


def unserved(phases):
    """{source: how many places of the current round are still to come}."""
    *_, phase = phases
    counts, after_first = counts_at(phase, phase["served"]), phase["served"] - sum(phase["first"].values())
    rounds = max(0, -(-after_first // sum(phase["places"].values())))
    return {source: phase["first"][source] + rounds * own - counts[source] for source, own in phase["places"].items()}


def next_phase(phases, samples, places=None, goes_on=False):
    """-> phases and one more, for data with these {source: samples}, by a round of `places`; without, of each sample.

    goes_on: the mix is the one before, and what it has left of a round comes first, together with what is new.
    """
    first = places = places or samples
    if goes_on:
        before, rest = phases[-1]["places"], unserved(phases)
        first = {source: rest.get(source, 0) + own - before.get(source, 0) for source, own in places.items()}
    return [*phases, {"samples": samples, "places": places, "first": first, "served": 0}]


# ----------------------------------------------------------------------------------------------------------------------
# The mix


def parse_mix(flag, text, samples):
    """web=2,zh=0.5 -> [(number, sources that the name means)]. A name is that of a source, or of a language.

    ValueError with one line for what cannot be read, and for names that mean nothing, or what another has named.
    """
    named, seen = [], {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = Fraction(number)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{flag} {part}: expected a name and a number, such as web=2") from None
        sources = [source for source in samples if name in (source, *source.rsplit(" ", 1))]
        if not sources:
            raise ValueError(f"{flag} {name}: the data have {', '.join(samples)}: name one, or its source or language")
        for source in sources:
            if source in seen:
                raise ValueError(f"{flag}: {seen[source]} and {name} both mean {source}: name it once")
            seen[source] = name
        if value < 0:
            raise ValueError(f"{flag} {part}: expected 0 or more")
        named.append((value, sources))
    return named


def places_of(samples, mix=None, shares=None):
    """The places of a round, {source: int}: by --mix how many epochs of named sources, and one of all others; or by
    --mix-share."""
    if shares:
        return places_by_share(samples, shares)
    epochs = dict.fromkeys(samples, 1)
    for value, sources in parse_mix("--mix", mix, samples) if mix else []:
        epochs |= dict.fromkeys(sources, value)
    exact = {source: epochs[source] * n for source, n in samples.items()}
    places = {source: max(1, round(value)) if value else 0 for source, value in exact.items()}
    if not any(places.values()):
        raise ValueError(f"--mix {mix}: nothing is left to train on")
    return places


def places_by_share(samples, shares):
    """Named sources have their shares of the places, which add up to 1; others have none. In smallest whole numbers."""
    named, exact = parse_mix("--mix-share", shares, samples), dict.fromkeys(samples, Fraction(0))
    if (total := sum(value for value, _ in named)) != 1:
        raise ValueError(f"--mix-share {shares}: the shares add up to {float(total):g}, expected 1")
    for value, sources in named:
        n = sum(samples[source] for source in sources)
        if value and not n:
            raise ValueError(f"--mix-share {shares}: {' and '.join(sources)} has no sample: leave it out")
        exact |= {source: value * samples[source] / max(n, 1) for source in sources}
    common = math.lcm(*(value.denominator for value in exact.values()))
    places = [int(value * common) for value in exact.values()]
    return {source: own // math.gcd(*places) for source, own in zip(exact, places)}
