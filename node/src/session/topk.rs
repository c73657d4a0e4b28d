//! From a row of logits to what the client samples from: the k largest and the log-sum-exp. Pure.
//!
//! A row of a 128k vocabulary is 513 kB; the top 256 with the log-sum-exp are 2 kB and give the
//! exact probability of each of them.

/// Lanes of the reductions: a multiple of every vector width in use, so that they vectorise.
const LANES: usize = 32;

/// ln Σ exp(x), or `None` when a value is NaN or +∞ (−∞ is a token that cannot be).
pub(crate) fn log_sum_exp(row: &[f32]) -> Option<f32> {
    let max = finite_max(row)?;
    let mut lanes = [0f32; LANES];
    let mut total = 0f64;
    // Lanes are emptied into f64 every few thousand values: 128k f32 additions lose digits.
    for block in row.chunks(LANES * 128) {
        let mut chunks = block.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += exp_nonpositive(x - max);
            }
        }
        total += chunks
            .remainder()
            .iter()
            .map(|x| f64::from(exp_nonpositive(x - max)))
            .sum::<f64>();
        total += lanes.iter().map(|l| f64::from(*l)).sum::<f64>();
        lanes = [0f32; LANES];
    }
    Some((f64::from(max) + total.ln()) as f32)
}

/// The largest value; `None` when the row is empty, or holds NaN, or +∞, or nothing but −∞.
fn finite_max(row: &[f32]) -> Option<f32> {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for ((m, b), x) in max.iter_mut().zip(&mut bad).zip(chunk) {
            *m = if *x > *m { *x } else { *m };
            *b |= x.is_nan();
        }
    }
    let tail = chunks.remainder();
    if bad.contains(&true) || tail.iter().any(|x| x.is_nan()) {
        return None;
    }
    let max = max
        .iter()
        .chain(tail)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    max.is_finite().then_some(max)
}

/// exp(x) for x ≤ 0 to about 2 ulp, in a form the compiler vectorises (libm's is a call a value).
fn exp_nonpositive(x: f32) -> f32 {
    // Below −87 the result is under the smallest normal number: nothing beside the 1 of the maximum.
    let x = x.max(-87.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    // Two-part ln 2 (Cody and Waite), so that the remainder keeps its digits.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4_f32;
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p.mul_add(r, c);
    }
    let e = (p * r).mul_add(r, r) + 1.0;
    // n is in −126..=0: the biased exponent stays normal. Adding 1.5·2^23 leaves n in the low
    // bits, which is how a conversion vectorises everywhere.
    let biased = (n + 12_582_912.0 + 127.0).to_bits() << 23;
    e * f32::from_bits(biased)
}

/// The `k` largest logits with their token ids: descending, equal ones by ascending id, so that the
/// first is what an argmax over the row gives.
#[derive(Debug, Default)]
pub(super) struct TopK {
    found: Vec<(u32, f32)>,
}

impl TopK {
    /// Selects from `row`, which holds no NaN. The result lives in a buffer that is reused.
    pub(super) fn select(&mut self, row: &[f32], k: usize) -> &[(u32, f32)] {
        let k = k.min(row.len());
        let found = &mut self.found;
        found.clear();
        if k == 0 {
            return found;
        }
        let room = (2 * k).max(64);
        let mut floor = f32::NEG_INFINITY;
        for (id, logit) in (0u32..).zip(row) {
            // A later equal value loses against an earlier one, so `>` is enough once k are held.
            if *logit > floor || found.len() < k {
                found.push((id, *logit));
                if found.len() == room {
                    floor = keep(found, k);
                }
            }
        }
        keep(found, k);
        found.sort_unstable_by(order);
        found
    }
}

/// Keeps the best k; returns the least of them.
fn keep(found: &mut Vec<(u32, f32)>, k: usize) -> f32 {
    if found.len() > k {
        found.select_nth_unstable_by(k - 1, order);
        found.truncate(k);
    }
    found.iter().map(|f| f.1).fold(f32::INFINITY, f32::min)
}

fn order(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut x = seed;
        let mut next = || {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (x >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..n).map(|_| (next() + next() - 1.0) * 20.0).collect()
    }

    #[test]
    fn log_sum_exp_agrees_with_f64() {
        for n in [1, 7, 31, 32, 33, 1000, 128_256] {
            let row = noise(n as u64, n);
            let max = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
            let exact = max
                + row
                    .iter()
                    .map(|x| (f64::from(*x) - max).exp())
                    .sum::<f64>()
                    .ln();
            let got = f64::from(log_sum_exp(&row).unwrap());
            assert!(
                (got - exact).abs() < 2e-6 * exact.abs().max(1.0),
                "n {n}: {got} against {exact}"
            );
        }
    }

    #[test]
    fn extremes_neither_overflow_nor_pass() {
        assert_eq!(log_sum_exp(&[-1000.0, 1000.0]), Some(1000.0));
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 3.0]), Some(3.0));
        assert_eq!(log_sum_exp(&[1.0, f32::NAN]), None);
        let mut long = vec![0.0; 64];
        long[3] = f32::NAN;
        assert_eq!(log_sum_exp(&long), None);
        assert_eq!(log_sum_exp(&[f32::INFINITY]), None);
        assert_eq!(log_sum_exp(&[]), None);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 40]), None);
    }

    #[test]
    fn top_k_equals_sorting_everything() {
        let mut top = TopK::default();
        for (n, k) in [
            (1, 1),
            (10, 3),
            (1000, 1),
            (1000, 256),
            (5000, 5000),
            (300, 1000),
        ] {
            let mut row = noise(n as u64 + 9, n);
            if n > 20 {
                row[17] = row[3];
            }
            let mut all: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
            all.sort_by(order);
            all.truncate(k);
            assert_eq!(top.select(&row, k), all.as_slice(), "n {n} k {k}");
        }
        assert!(top.select(&[1.0], 0).is_empty());
    }

    #[test]
    fn equal_logits_go_to_the_lowest_id() {
        let mut top = TopK::default();
        assert_eq!(top.select(&vec![2.0; 1000], 2), &[(0, 2.0), (1, 2.0)]);
    }
}
