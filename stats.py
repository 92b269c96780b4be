"""Paired comparisons on n seeds: t, Holm, sign flips, equivalence, effect sizes, power. numpy and math, nothing else.

Everything takes plain lists of floats and returns floats (None where n cannot give one); analyze.py makes the report
of it. Student's t has whole degrees of freedom here, for which its distribution is an exact finite sum; the noncentral
t, for power and the intervals of effect sizes, is integrated numerically. tests/test_stats.py holds both against scipy.
"""
import math
import statistics
from bisect import bisect_left
from functools import lru_cache

import numpy as np

ALPHA, POWER = 0.05, 0.80
MOST_FLIPPED = 20                           # pairs, for the sign-flip test: it looks at all 2^n patterns
MOST_SEEDS = 10_000                         # a needed n above this is reported as "more than"


def root(f, low, high, rounds=60):
    """Where the increasing f changes sign between low and high, by bisection."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def t_tail(t, df):
    """P(T > t) of Student's t, whole df, to 1e-13: Abramowitz & Stegun 26.7.3 (odd df), 26.7.4 (even)."""
    theta, odd = math.atan(abs(t) / math.sqrt(df)), df % 2
    sin, cos = math.sin(theta), math.cos(theta)
    term = cos if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    area = 2 / math.pi * (theta + sin * total) if odd else sin * total      # P(-|t| < T < |t|)
    return (1 - math.copysign(min(1.0, area), t)) / 2


@lru_cache(maxsize=None)
def t_quantile(p, df):
    """The t with P(T <= t) = p, for 0.5 <= p < 1; bisection over the angle of A&S 26.7."""
    t = lambda angle: math.sqrt(df) * math.tan(angle)       # noqa: E731
    return t(root(lambda angle: 1 - p - t_tail(t(angle), df), 0, math.pi / 2 * (1 - 1e-15)))


NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def noncentral_t_cdf(t, df, ncp):
    """P((Z + ncp) / U <= t), Z normal, U^2 a chi-square over its df: the integral of Phi(t u - ncp) f(u) du.

    Gauss-Legendre with 64 nodes before, across and after the step of Phi at u = ncp / t.
    """
    if t < 0:
        return 1 - noncentral_t_cdf(-t, df, -ncp)
    low, high = max(0.0, 1 - 9 / math.sqrt(df)), 1 + 9 / math.sqrt(df)
    edges = np.clip([low, (ncp - 8) / max(t, 1e-9), (ncp + 8) / max(t, 1e-9), high], low, high)
    total, log_scale = 0.0, math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    for a, b in zip(edges[:-1], edges[1:]):
        if b > a:
            u = (a + b) / 2 + (b - a) / 2 * NODES
            f = np.exp(log_scale + (df - 1) * np.log(u) - df * u * u / 2)
            phi = np.array([math.erfc((ncp - t * x) / math.sqrt(2)) / 2 for x in u])
            total += float((b - a) / 2 * np.sum(WEIGHTS * f * phi))
    return total


def ncp_interval(t, df):
    """The 95% interval of the noncentrality behind a t (Steiger & Fouladi 1997); divided by sqrt(n), that of d_z."""
    reach = 20 * math.sqrt(1 + t * t / (2 * df))
    return [root(lambda ncp: p - noncentral_t_cdf(t, df, ncp), t - reach, t + reach, 50)
            for p in (1 - ALPHA / 2, ALPHA / 2)]


def power(effect, n, alpha=ALPHA):
    """Power of the two-sided paired t test with n pairs; effect: true mean difference over the sd of d."""
    t, ncp = t_quantile(1 - alpha / 2, n - 1), abs(effect) * math.sqrt(n)
    return 1 - noncentral_t_cdf(t, n - 1, ncp) + noncentral_t_cdf(-t, n - 1, ncp)


@lru_cache(maxsize=None)
def detectable(n, alpha=ALPHA):
    """The true difference, in standard deviations of d, that n pairs find with the wanted power."""
    high = 2 * t_quantile(1 - alpha / 2, n - 1) + 6
    return root(lambda effect: power(effect, n, alpha) - POWER, 0, high, 40)


def needed_n(effect, alpha=ALPHA):
    """The fewest pairs (2 or more) that find it with the wanted power; None if more than MOST_SEEDS."""
    n = 2 + bisect_left(range(2, MOST_SEEDS + 1), POWER, key=lambda n: power(effect, n, alpha))
    return n if n <= MOST_SEEDS else None


def holm(ps):
    """Holm's (1979) step-down adjusted p values, in the order given; None stays None and counts as a p of 1."""
    ranked = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted, worst = list(ps), 0.0
    for rank, (p, i) in enumerate(ranked):
        worst = max(worst, min(1.0, p * (len(ps) - rank)))
        adjusted[i] = worst
    return adjusted


def sign_flip(d):
    """Two-sided p of the sign-flip permutation test on the mean (Fisher 1935); None past MOST_FLIPPED pairs.

    The share of the 2^n sign patterns whose |sum| is at least the observed one, so never below 2 / 2^n.
    """
    if len(d) > MOST_FLIPPED:
        return None
    d = np.asarray(d, dtype=float)
    sums = d[:1]                                            # the other half of the patterns mirrors this one
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()))    # ties count, rounded or not


def hedges(df):
    """Hedges' (1981) exact factor against the small-sample bias of a standardised mean, or None."""
    return math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2) if df > 1 else None


def summary(values, alpha=ALPHA):
    """n, mean, sd (over n - 1) and the t interval of the mean at 1 - alpha; None for what this n cannot give."""
    n, s = len(values), dict.fromkeys(['mean', 'sd', 'low', 'high'])
    if n:
        s['mean'] = statistics.fmean(values)
    if n > 1:
        s['sd'] = statistics.stdev(values)                  # in fractions: of equal values exactly 0
        half = t_quantile(1 - alpha / 2, n - 1) * s['sd'] / math.sqrt(n)
        s['low'], s['high'] = s['mean'] - half, s['mean'] + half
    return {'n': n, **s}


def correlation(x, y):
    """Pearson's r of two lists, or None where it has none: fewer than three pairs, or a list that is one number."""
    if len(x) < 3 or not summary(x)['sd'] or not summary(y)['sd']:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def paired(variant, base, margin, tests=1):
    """Two lists in the order of their seeds -> all that is said about d_i = variant_i - base_i, as a dict.

    margin in the unit of the values. tests: how many comparisons the family has, this one included; low_all to
    high_all is the interval at the level 1 - ALPHA / tests, so that all of a family cover at once with 95%
    (Bonferroni), and the power figures are at ALPHA / tests. n = 1: the difference itself, nothing else.
    All d_i one number: no spread, no t statistic; `constant` is True and what would need a spread stays None.
    """
    scale = max(map(abs, [*variant, *base]), default=0.0)
    d = [0.0 if abs(v - b) <= 1e-12 * scale else v - b for v, b in zip(variant, base)]
    n, base_mean = len(d), summary(base)['mean']
    c = {'d': d, **summary(d), 'constant': False, 'floor': 2 / 2 ** n if n > 1 else None,
         'percent': 100 * math.fsum(d) / n / base_mean if base_mean else None, **dict.fromkeys(
             ['low_all', 'high_all', 't', 'p', 'sign_flip', 'tost', 'd_z', 'g_z', 'd_z_low', 'd_z_high', 'd_pooled',
              'g_pooled', 'd_pooled_low', 'd_pooled_high', 'correlation', 'detectable', 'needed_n'])}
    if n < 2:
        return c
    c['sign_flip'] = sign_flip(d)
    if c['sd'] <= 1e-11 * scale:
        return {**c, 'constant': True, 'sd': 0.0, 'low': None, 'high': None}
    se, df, alpha = c['sd'] / math.sqrt(n), n - 1, ALPHA / tests
    c['low_all'], c['high_all'] = (summary(d, alpha)[end] for end in ('low', 'high'))
    c['t'], c['d_z'] = c['mean'] / se, c['mean'] / c['sd']
    c['p'] = 2 * t_tail(abs(c['t']), df)
    # two one-sided tests (Schuirmann 1987) of |true difference| >= margin
    c['tost'] = max(t_tail((c['mean'] + margin) / se, df), t_tail((margin - c['mean']) / se, df))
    c['detectable'], c['needed_n'] = c['sd'] * detectable(n, alpha), needed_n(margin / c['sd'], alpha)
    c['d_z_low'], c['d_z_high'] = (ncp / math.sqrt(n) for ncp in ncp_interval(c['t'], df))
    c['g_z'] = hedges(df) and hedges(df) * c['d_z']
    sd_v, sd_b = summary(variant)['sd'], summary(base)['sd']
    ratio = c['sd'] / math.sqrt((sd_v ** 2 + sd_b ** 2) / 2)        # d_z -> d: Algina & Keselman 2003
    for key in ('', '_low', '_high'):
        c[f'd_pooled{key}'] = c[f'd_z{key}'] * ratio
    c['correlation'] = correlation(variant, base)
    # sds of correlated groups carry fewer degrees of freedom than 2(n-1): Cousineau 2020, TQMP 16(4)
    factor = hedges(2 * df / (1 + (c['correlation'] or 0.0) ** 2)) if n > 2 else None     # n = 2: all but 0
    c['g_pooled'] = factor and factor * c['d_pooled']
    return c
