"""The statistics against scipy, textbooks, hand counts and simulation."""
import itertools
import math

import numpy as np
import pytest

import stats

reference = pytest.importorskip('scipy.stats', reason='scipy is the reference here: pip install scipy')


@pytest.mark.parametrize('df', [1, 2, 3, 4, 5, 7, 8, 15, 30, 101, 1000])
def test_students_t_agrees_with_scipy(df):
    for t in (0.0, 1e-3, 0.5, 1.0, 2.3, 5.0, 12.0, 300.0):
        assert stats.t_tail(t, df) == pytest.approx(reference.t.sf(t, df), abs=1e-12)
        assert stats.t_tail(-t, df) == pytest.approx(reference.t.cdf(t, df), abs=1e-12)
    for p in (0.5, 0.6, 0.9, 0.95, 0.975, 0.995, 0.9995):
        assert stats.t_quantile(p, df) == pytest.approx(reference.t.ppf(p, df), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('df', [1, 2, 4, 7, 23, 200])
def test_noncentral_t_agrees_with_scipy(df):
    compared = 0
    for ncp in (-3.0, 0.0, 0.7, 2.8, 9.0):
        for t in (-4.0, -0.5, 0.0, 0.3, 2.4, 6.0, 40.0):
            expected = float(reference.nct.cdf(t, df, ncp))
            if math.isfinite(expected):                 # scipy gives nan in some far tails
                assert stats.noncentral_t_cdf(t, df, ncp) == pytest.approx(expected, abs=1e-6), (t, ncp)
                compared += 1
    assert compared >= 30


def test_noncentral_t_stays_right_where_its_step_is_narrow():
    """t = 2000: Phi(t u - ncp) is a step of width 1/2000; against chi, the limit for large t."""
    for share in (0.6, 0.9, 1.0, 1.3):
        expected = 1 - reference.chi2.cdf(7 * share ** 2, 7)
        assert stats.noncentral_t_cdf(2000.0, 7, 2000.0 * share) == pytest.approx(expected, abs=1e-5)


def test_power_and_needed_n_have_the_published_values():
    """Cohen's d_z = 0.5, two-sided 0.05: 34 pairs for 80% power (G*Power 3.1); 0.8: 15; 0.2: 199."""
    assert [stats.needed_n(effect) for effect in (0.5, 0.8, 0.2)] == [34, 15, 199]


def test_power_agrees_with_scipy_and_the_detectable_difference_inverts_it():
    for n, effect, alpha in [(3, 1.5, 0.05), (8, 1.1, 0.05), (8, 1.1, 0.01), (20, 0.6, 0.025)]:
        critical = reference.t.ppf(1 - alpha / 2, n - 1)
        expected = reference.nct.sf(critical, n - 1, effect * n ** .5) + \
                                reference.nct.cdf(-critical, n - 1, effect * n ** .5)
        assert stats.power(effect, n, alpha) == pytest.approx(expected, abs=1e-6)
    for n in (2, 3, 8, 30):
        assert stats.power(stats.detectable(n), n) == pytest.approx(0.8, abs=1e-6)
    assert stats.needed_n(stats.detectable(8) * 1.0001) == 8
    assert stats.needed_n(1e-6) is None


def test_a_needed_n_is_the_smallest_that_suffices():
    for effect in (0.3, 0.9, 2.5, 40.0):
        n = stats.needed_n(effect)
        assert stats.power(effect, n) >= 0.8 and (n == 2 or stats.power(effect, n - 1) < 0.8)


def test_holm_follows_the_worked_example():
    """.01, .04, .03, .005 over four tests: .005*4 = .02, .01*3 = .03, .03*2 = .06, .04*1 -> at least .06."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([0.02, None, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.06)]      # not tested yet
    assert stats.holm([]) == []


def test_sign_flip_agrees_with_counting_by_hand():
    assert stats.sign_flip([1.0, 2.0, 3.0]) == 0.25          # only +++ and --- reach |sum| = 6
    assert stats.sign_flip([1.0, 2.0, -3.0]) == 1.0          # a sum of 0: all 8 patterns reach it
    assert stats.sign_flip([0.1, 0.2, -0.05]) == 0.5         # 0.25, 0.35 and their mirrors: 4 of 8
    assert stats.sign_flip([0.0, 0.0]) == 1.0
    assert stats.sign_flip([5.0]) == 1.0
    assert stats.sign_flip([0.1] * 8) == 2 / 256             # the floor


def test_sign_flip_agrees_with_a_loop_over_all_patterns():
    rng = np.random.default_rng(3)
    for n in (2, 5, 9, 12):
        d = rng.normal(0.4, 1, n).round(1)                             # rounded: ties must count
        hits = sum(abs(np.dot(signs, d)) >= abs(d.sum()) - \
                   1e-9 for signs in itertools.product((1, -1), repeat=n))
        assert stats.sign_flip(d) == pytest.approx(hits / 2 ** n)
    assert stats.sign_flip([0.1] * 21) is None


def test_hedges_factor_has_its_published_values():
    """J(11) = 0.92996, J(22) = 0.96545: R package CohensdpLibrary, help of J(). J(2) = 1/sqrt(pi)."""
    assert stats.hedges(11) == pytest.approx(0.9299598, abs=1e-7)
    assert stats.hedges(22) == pytest.approx(0.9654507, abs=1e-7)
    assert stats.hedges(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert stats.hedges(1) is None


def test_the_paired_test_reproduces_students_sleep_data():
    """Student 1908, as R's t.test(paired = TRUE) gives it: t = -4.0621, p = 0.002833, [-2.4599, -0.7001]."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    c = stats.paired(one, two, 0.5)
    assert c['t'] == pytest.approx(-4.0621, abs=5e-5)
    assert c['p'] == pytest.approx(0.002833, abs=5e-7)
    assert (c['low'], c['high']) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert c['d_z'] == pytest.approx(-1.2845, abs=1e-4)


def test_paired_agrees_with_scipy_in_everything_scipy_has():
    rng = np.random.default_rng(11)
    for n in (2, 3, 8, 13):
        base = rng.normal(4, 0.02, n)
        variant = base + rng.normal(0.005, 0.01, n)
        c, d = stats.paired(list(variant), list(base), 0.01), variant - base
        expected = reference.ttest_rel(variant, base)
        assert (c['t'], c['p']) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-8)
        assert (c['low'], c['high']) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-8)
        wider = stats.paired(list(variant), list(base), 0.01, tests=4)
        assert (wider['low_all'], wider['high_all']) == pytest.approx(tuple(expected.confidence_interval(1 - 0.05 / 4)), rel=1e-8)
        assert (wider['low'], wider['p']) == (c['low'], c['p']) and c['low_all'] == c['low']
        upper = reference.ttest_1samp(d, 0.01, alternative='less').pvalue
        lower = reference.ttest_1samp(d, -0.01, alternative='greater').pvalue
        assert c['tost'] == pytest.approx(max(upper, lower), abs=1e-10)
        assert c['d_pooled'] == pytest.approx(
            d.mean() / math.sqrt((variant.var(ddof=1) + base.var(ddof=1)) / 2))
        if n > 2:
            assert c['correlation'] == pytest.approx(reference.pearsonr(variant, base).statistic, abs=1e-8)
            assert c['g_z'] == pytest.approx(stats.hedges(n - 1) * c['d_z'])
            carried = 2 * (n - 1) / (1 + c['correlation'] ** 2)        # Cousineau 2020; 2(n-1) when unrelated
            assert c['g_pooled'] == pytest.approx(stats.hedges(carried) * c['d_pooled'])
        for bound, tail in ((c['d_z_low'], 0.975), (c['d_z_high'], 0.025)):
            assert reference.nct.cdf(c['t'], n - 1, bound * math.sqrt(n)) == pytest.approx(tail, abs=1e-5)


def test_under_the_null_holm_keeps_the_family_wise_rate_where_uncorrected_tests_do_not():
    rng, rounds, corrected, uncorrected = np.random.default_rng(4), 2000, 0, 0
    losses = rng.normal(0, 1, (rounds, 6, 8))          # a baseline and five variants, all the same
    for arms in losses:
        ps = []
        for variant in arms[1:]:
            s = stats.summary(list(variant - arms[0]))
            ps.append(2 * stats.t_tail(abs(s['mean']) / (s['sd'] / math.sqrt(8)), 7))
        corrected += min(stats.holm(ps)) < 0.05
        uncorrected += min(ps) < 0.05
    assert corrected / rounds < 0.05 + 0.015
    assert uncorrected / rounds > 0.10


def test_effect_sizes_are_unbiased_and_their_intervals_cover():
    """True d_z 0.8; groups of correlation 0.9 and sd 1, so pooled d = 0.8 * sqrt(2 (1 - 0.9)) = 0.358."""
    rng, rounds, n, r = np.random.default_rng(8), 400, 8, 0.9
    spread = math.sqrt(2 * (1 - r))
    pooled, found = 0.8 * spread, []
    for _ in range(rounds):
        base = rng.normal(0, 1, n)
        variant = r * base + math.sqrt(1 - r * r) * rng.normal(0, 1, n) + pooled
        c = stats.paired(list(variant), list(base), 0.5)
        found.append((c['g_z'], c['g_pooled'], c['d_z_low'] < 0.8 < c['d_z_high'],
                      c['d_pooled_low'] < pooled < c['d_pooled_high']))
    g_z, g_pooled, covers_z, covers_pooled = np.mean(found, axis=0)
    assert g_z == pytest.approx(0.8, abs=0.08)
    assert g_pooled == pytest.approx(pooled, abs=0.04)
    assert abs(covers_z - 0.95) < 0.044                # 4 standard errors
    assert abs(covers_pooled - 0.95) < 0.05            # approximate by construction


def test_a_correlation_needs_three_pairs_and_two_spreads():
    assert stats.correlation([1.0, 2.0], [1.0, 2.0]) is stats.correlation([1.0, 2.0, 3.0], [0.1 + 0.2] * 3) is None
    assert stats.correlation([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]) == pytest.approx(-1)
