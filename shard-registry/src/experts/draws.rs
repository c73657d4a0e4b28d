//! How a row's picks fall on holders.
//!
//! A router picks `k` of a layer's experts, none twice. That a set is picked counts as proportional to the product
//! of its experts' odds (conditional Poisson sampling; with equal odds each set is as likely as any other), so how
//! many picks a holder gets is read from polynomials: the coefficient of xⁿ in Π (1 + odds · x) over its experts
//! stands for all ways to pick n of them.

/// The picks of one layer, by holder.
pub(super) struct Draws {
    /// Of each holder the coefficients of its polynomial, up to `k`.
    ways: Vec<Vec<f64>>,
    k: usize,
}

impl Draws {
    /// `shares` are of each holder the picks of a row that each of its experts gets on average; all together `k`.
    pub(super) fn of(shares: &[Vec<f64>], k: usize) -> Draws {
        let n: usize = shares.iter().map(Vec::len).sum();
        let k = k.min(n);
        // Scaled so that the coefficients stay near one another: it changes no probability.
        let middle = k as f64 / (n as f64 - k as f64).max(0.5);
        let odds = |share: &f64| {
            let share = share.clamp(1e-6, 1.0 - 1e-6);
            share / (1.0 - share) / middle.max(1e-6)
        };
        let ways = shares.iter().map(|shares| {
            let mut ways = vec![0.0; k + 1];
            ways[0] = 1.0;
            for odds in shares.iter().map(odds) {
                for n in (1..=k).rev() {
                    ways[n] += ways[n - 1] * odds;
                }
            }
            ways
        });
        Draws {
            ways: ways.collect(),
            k,
        }
    }

    /// All ways in which no holder gets more picks than its limit; a limit below 0 is 0.
    fn within(&self, limits: &[usize]) -> f64 {
        let mut all = vec![0.0; self.k + 1];
        all[0] = 1.0;
        for (ways, limit) in self.ways.iter().zip(limits) {
            for n in (0..=self.k).rev() {
                let few = (0..=n.min(*limit)).map(|of_holder| all[n - of_holder] * ways[of_holder]);
                all[n] = few.sum();
            }
        }
        all[self.k]
    }

    /// How likely it is that a holder gets a pick.
    pub(super) fn asked(&self, holder: usize) -> f64 {
        let mut limits = vec![self.k; self.ways.len()];
        let all = self.within(&limits);
        if let Some(limit) = limits.get_mut(holder) {
            *limit = 0;
        }
        1.0 - self.within(&limits) / all
    }

    /// The mean over all picks of the largest of what the holders take: `takes(holder, n)` for `n` picks, which
    /// grows with `n` and is not asked for 0.
    pub(super) fn mean_of_largest(&self, takes: impl Fn(usize, usize) -> f64) -> f64 {
        let of = |(holder, ways): (usize, &Vec<f64>)| -> Vec<f64> {
            let possible = (1..=self.k).take_while(|n| ways[*n] > 0.0);
            possible.map(|n| takes(holder, n)).collect()
        };
        let takes: Vec<Vec<f64>> = self.ways.iter().enumerate().map(of).collect();
        let mut steps: Vec<f64> = takes.iter().flatten().copied().collect();
        steps.sort_unstable_by(f64::total_cmp);
        steps.dedup();
        let all = self.within(&vec![self.k; self.ways.len()]);
        // The sum over steps of how likely it is that the largest is beyond the one before.
        let (mut mean, mut before, mut beyond) = (0.0, 0.0, 1.0);
        for step in steps {
            mean += (step - before) * beyond;
            let limit = |takes: &Vec<f64>| takes.partition_point(|takes| *takes <= step);
            let limits: Vec<usize> = takes.iter().map(limit).collect();
            (before, beyond) = (step, 1.0 - self.within(&limits) / all);
            if beyond < 1e-9 {
                break;
            }
        }
        mean
    }
}
