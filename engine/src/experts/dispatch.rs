//! One block of a trunk's graph: picks to calls, answers to rows in their order.

use std::collections::BTreeMap;

use super::block::Block;
use super::message::{ExpertCall, ExpertError, ExpertReply, Group};

/// Whoever computes experts, as the implementation of [`ExpertHolders`] numbers
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HolderId(pub u32);

/// Those who compute a trunk's experts. The engine knows no more of them.
pub trait ExpertHolders: Send + Sync {
    /// Who is asked for an expert just now. All rows that a call has for it go
    /// there, together: their number decides how they are computed.
    fn holder_of(&self, layer: u32, expert: u32) -> Option<HolderId>;

    /// The same for all experts that a call of `layer` takes, with the rows it has for each: one answer an
    /// expert, in their order.
    fn place(&self, layer: u32, experts: &[(u32, u32)]) -> Vec<Option<HolderId>> {
        let each = experts.iter();
        each.map(|(expert, _)| self.holder_of(layer, *expert))
            .collect()
    }

    /// Asks all at once and waits for all: as many answers as calls, in their
    /// order. An implementation may have another holder of the same experts
    /// answer. Called on the thread that runs the trunk.
    ///
    /// # Errors
    /// The first reason for which there is no answer; the step fails with it,
    /// and may be run again.
    fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError>;
}

/// What a router chose, and the rows it chose for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Picks {
    pub n_embd: usize,
    /// Experts that each token takes.
    pub n_used: usize,
    /// Token after token.
    pub experts: Vec<u32>,
    /// Rows that a token has: one for all its experts, or one for each.
    pub n_rows: usize,
    /// Token after token.
    pub rows: Vec<f32>,
}

/// Where an answer's row goes.
struct Way {
    holder: HolderId,
    call: ExpertCall,
    /// For each row that comes back, the pick it is for.
    picks: Vec<usize>,
}

/// Asks for everything that `picks` take: rows of `n_embd` for each pick, token
/// after token.
pub(crate) fn dispatch(
    block: &Block,
    first_layer: u32,
    picks: &Picks,
    holders: &dyn ExpertHolders,
) -> Result<Vec<f32>, ExpertError> {
    let layer = first_layer + block.layer;
    let ways = ways(block, layer, picks, holders)?;
    let mut calls = Vec::with_capacity(ways.len());
    let mut back = Vec::with_capacity(ways.len());
    for way in ways {
        calls.push((way.holder, way.call));
        back.push((way.holder, way.picks));
    }
    let replies = holders.ask(calls)?;
    if replies.len() != back.len() {
        let why = format!("{} answers to {} calls", replies.len(), back.len());
        return Err(ExpertError::Backend(why));
    }
    let n = picks.n_embd;
    let mut out = vec![0.0; picks.experts.len() * n];
    for ((holder, picks), reply) in back.into_iter().zip(replies) {
        check_reply(holder, layer, &reply, picks.len() * n)?;
        for (pick, row) in picks.into_iter().zip(reply.rows.chunks_exact(n)) {
            out[pick * n..(pick + 1) * n].copy_from_slice(row);
        }
    }
    Ok(out)
}

fn check_reply(
    holder: HolderId,
    layer: u32,
    reply: &ExpertReply,
    expected: usize,
) -> Result<(), ExpertError> {
    let why = match reply.rows.len() {
        len if len != expected => format!("{len} values, {expected} expected"),
        _ if !crate::stage::all_finite(&reply.rows) => "a value is not finite".into(),
        _ => return Ok(()),
    };
    Err(ExpertError::Reply {
        holder: format!("holder {}", holder.0),
        layer,
        why,
    })
}

fn ways(
    block: &Block,
    layer: u32,
    picks: &Picks,
    holders: &dyn ExpertHolders,
) -> Result<Vec<Way>, ExpertError> {
    let mut by_expert: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (pick, &expert) in picks.experts.iter().enumerate() {
        by_expert.entry(expert).or_default().push(pick);
    }
    let mut by_holder: BTreeMap<HolderId, Vec<(u32, Vec<usize>)>> = BTreeMap::new();
    let wanted: Vec<_> = by_expert
        .iter()
        .map(|(expert, picks)| (*expert, picks.len() as u32))
        .collect();
    let mut placed = holders.place(layer, &wanted).into_iter();
    for (expert, of_expert) in by_expert {
        let none = ExpertError::NotHeld { layer, expert };
        let holder = placed.next().flatten().ok_or(none)?;
        by_holder
            .entry(holder)
            .or_default()
            .push((expert, of_expert));
    }
    let way = |(holder, experts): (HolderId, Vec<(u32, Vec<usize>)>)| {
        let mut sent = BTreeMap::new();
        let mut call = ExpertCall {
            layer,
            form: block.form,
            n_embd: picks.n_embd as u32,
            groups: Vec::with_capacity(experts.len()),
            hidden: Vec::new(),
        };
        let mut all = Vec::new();
        for (expert, of_expert) in experts {
            let rows = of_expert
                .iter()
                .map(|pick| row_of(*pick, picks, &mut sent, &mut call.hidden))
                .collect();
            call.groups.push(Group { expert, rows });
            all.extend(of_expert);
        }
        Way {
            holder,
            call,
            picks: all,
        }
    };
    Ok(by_holder.into_iter().map(way).collect())
}

/// The row of a pick in the call, where it is put once.
fn row_of(
    pick: usize,
    picks: &Picks,
    sent: &mut BTreeMap<usize, u32>,
    hidden: &mut Vec<f32>,
) -> u32 {
    let (token, slot) = (pick / picks.n_used, pick % picks.n_used);
    let row = token * picks.n_rows + slot % picks.n_rows;
    let next = sent.len() as u32;
    *sent.entry(row).or_insert_with(|| {
        hidden.extend_from_slice(&picks.rows[row * picks.n_embd..(row + 1) * picks.n_embd]);
        next
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::experts::{Activation, Form, Parts};

    /// Expert e multiplies rows by e; even experts are with 0, odd ones with 1,
    /// number 9 with nobody.
    #[derive(Default)]
    struct Times {
        asked: Mutex<Vec<(HolderId, ExpertCall)>>,
        spoil: Option<fn(&mut Vec<ExpertReply>)>,
    }

    impl ExpertHolders for Times {
        fn holder_of(&self, _: u32, expert: u32) -> Option<HolderId> {
            (expert != 9).then_some(HolderId(expert % 2))
        }

        fn ask(&self, calls: Vec<(HolderId, ExpertCall)>) -> Result<Vec<ExpertReply>, ExpertError> {
            let mut replies = Vec::new();
            for (_, call) in &calls {
                call.check()?;
                let n = call.n_embd as usize;
                let mut rows = Vec::new();
                for group in &call.groups {
                    for &row in &group.rows {
                        let row = &call.hidden[row as usize * n..][..n];
                        rows.extend(row.iter().map(|value| value * group.expert as f32));
                    }
                }
                replies.push(ExpertReply { rows });
            }
            *self.asked.lock().unwrap() = calls;
            if let Some(spoil) = self.spoil {
                spoil(&mut replies);
            }
            Ok(replies)
        }
    }

    fn block() -> Block {
        let form = Form {
            activation: Activation::SwiGlu,
            parts: Parts::default(),
        };
        Block {
            layer: 1,
            form,
            first: 0,
            last: 3,
        }
    }

    fn picks(n_rows: usize) -> Picks {
        let rows: Vec<f32> = (0..3 * n_rows).map(|i| (i + 1) as f32).collect();
        Picks {
            n_embd: 2,
            n_used: 2,
            experts: vec![4, 1, 2, 4, 3, 1],
            n_rows,
            rows: rows.into_iter().flat_map(|v| [v, -v]).collect(),
        }
    }

    #[test]
    fn rows_come_back_in_the_order_of_picks() {
        for n_rows in [1, 2] {
            let (holders, picks) = (Times::default(), picks(n_rows));
            let out = dispatch(&block(), 5, &picks, &holders).unwrap();
            for (pick, expert) in picks.experts.iter().enumerate() {
                let row = (pick / 2) * n_rows + (pick % 2) % n_rows;
                let value = *expert as f32 * (row + 1) as f32;
                assert_eq!(out[2 * pick..2 * pick + 2], [value, -value], "{pick}");
            }
            let asked = holders.asked.lock().unwrap();
            assert_eq!(asked.len(), 2, "a call a holder");
            assert!(asked.iter().all(|(_, call)| call.layer == 6));
            // A token's row travels once to a holder.
            let even = &asked[0].1;
            assert_eq!(even.groups[1].rows.len(), 2, "expert 4");
            assert_eq!(even.hidden.len(), 2 * if n_rows == 1 { 2 } else { 3 });
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_said() {
        let mut nobody = picks(1);
        nobody.experts[2] = 9;
        let missing = dispatch(&block(), 0, &nobody, &Times::default());
        let expected = ExpertError::NotHeld {
            layer: 1,
            expert: 9,
        };
        assert_eq!(missing, Err(expected));
        let spoils: [fn(&mut Vec<ExpertReply>); 3] = [
            |replies| replies[1].rows.truncate(2),
            |replies| replies[0].rows[1] = f32::INFINITY,
            |replies| drop(replies.pop()),
        ];
        for spoil in spoils {
            let holders = Times {
                spoil: Some(spoil),
                ..Times::default()
            };
            assert!(dispatch(&block(), 0, &picks(1), &holders).is_err());
        }
    }
}
