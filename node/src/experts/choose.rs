//! Which holder is asked for which expert of a call. Pure.
//!
//! A layer is done when its slowest holder has answered, so experts with several holders go where they are done
//! first. Each further holder costs the trunk a frame, an answer and their wake-ups, one after the other: a few
//! good holders are better than many, where that is all they differ in.

/// What asking one more holder costs beside its own time: a frame, an answer, the wake-ups of both.
const ONE_MORE: f64 = 40e-6;

/// The holder's number that stands for the trunk's own experts.
pub(super) const LOCAL: u32 = 0;

/// A holder for each expert, by its rows and those who have it; none for one that nobody has. `costs` gives what
/// asking a holder costs, and a row, in seconds. The trunk's own experts are computed there: nothing travels.
pub(super) fn choose(
    experts: &[(u32, &[u32])],
    costs: impl Fn(u32) -> (f64, f64),
) -> Vec<Option<u32>> {
    let mut chosen: Vec<Option<u32>> = vec![None; experts.len()];
    // When each holder in use is done, and what a row costs there.
    let mut busy: Vec<(u32, f64, f64)> = Vec::new();
    let mut open = Vec::new();
    for (at, (rows, holders)) in experts.iter().enumerate() {
        match holders {
            [] => {}
            [only] => {
                chosen[at] = Some(*only);
                take(&mut busy, *only, *rows, &costs);
            }
            _ if holders.contains(&LOCAL) => chosen[at] = Some(LOCAL),
            _ => open.push(at),
        }
    }
    // The largest first: what is left evens out.
    open.sort_by_key(|at| std::cmp::Reverse(experts[*at].0));
    for at in open {
        let (rows, holders) = experts[at];
        let done = |holder: &u32| match busy.iter().find(|(with, ..)| with == holder) {
            Some((_, done, row)) => done + row * f64::from(rows),
            None => {
                let (base, row) = costs(*holder);
                base + row * f64::from(rows) + ONE_MORE
            }
        };
        let best = holders
            .iter()
            .map(|holder| (done(holder), *holder))
            .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        if let Some((_, best)) = best {
            chosen[at] = Some(best);
            take(&mut busy, best, rows, &costs);
        }
    }
    chosen
}

fn take(
    busy: &mut Vec<(u32, f64, f64)>,
    holder: u32,
    rows: u32,
    costs: &impl Fn(u32) -> (f64, f64),
) {
    match busy.iter_mut().find(|(with, ..)| *with == holder) {
        Some((_, done, row)) => *done += *row * f64::from(rows),
        None => {
            let (base, row) = costs(holder);
            busy.push((holder, base + row * f64::from(rows), row));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEAR: (f64, f64) = (100e-6, 100e-6);

    #[test]
    fn what_is_here_is_computed_here_and_what_nobody_has_is_nobodys() {
        let experts: [(u32, &[u32]); 4] = [(1, &[0, 1, 2]), (1, &[]), (1, &[2]), (1, &[0])];
        let chosen = choose(&experts, |_| NEAR);
        assert_eq!(chosen, [Some(0), None, Some(2), Some(0)]);
    }

    #[test]
    fn few_holders_for_little_work_and_all_for_much() {
        let holders: &[u32] = &[1, 2, 3, 4];
        let light = vec![(1, holders); 8];
        let chosen = choose(&light, |_| (100e-6, 4e-6));
        assert_eq!(chosen, vec![Some(1); 8], "one does it as fast");
        let heavy = vec![(1, holders); 8];
        let chosen = choose(&heavy, |_| (100e-6, 1e-3));
        for holder in holders {
            let n = chosen.iter().filter(|c| **c == Some(*holder)).count();
            assert_eq!(n, 2, "{holder}");
        }
    }

    #[test]
    fn a_slow_or_loaded_holder_gets_less() {
        // 1 alone has two of the experts; the others can go to 1 or 2, and 3 is slow.
        let experts: [(u32, &[u32]); 6] = [
            (1, &[1]),
            (1, &[1]),
            (1, &[1, 2, 3]),
            (1, &[1, 2, 3]),
            (1, &[1, 2, 3]),
            (1, &[1, 2, 3]),
        ];
        let costs = |holder| match holder {
            3 => (20e-3, 1e-3),
            _ => (100e-6, 1e-3),
        };
        let chosen = choose(&experts, costs);
        let of = |holder| chosen.iter().filter(|c| **c == Some(holder)).count();
        assert_eq!((of(1), of(2), of(3)), (3, 3, 0));
    }
}
