//! Calls as the engine has them and as they travel.

use engine::{Activation, ExpertCall, ExpertError, Form, Group, Parts};
use swarm_proto::{
    Dtype, ExpertAsk, ExpertForm, ExpertGroup, ExpertRefusal, ExpertRows, FrameError, FrameLimits,
    activation,
    codec::cut_text,
    encode_frame,
    expert_call::{EXPERT_HEADER_MAX, EXPERT_ROWS_MAX, WHY_BYTES_MAX},
};

/// The first message of a stream, and what is answered while it is not agreed what a row is.
pub(super) const HELLO: FrameLimits = FrameLimits {
    header_max: 1024,
    payload_max: 0,
};

/// Calls, once the model is known: `n_used` is how many experts a row meets.
pub(super) fn calls(n_embd: u32, n_used: u32) -> FrameLimits {
    let rows = (engine::PREFILL_CHUNK as usize).saturating_mul(n_used as usize);
    FrameLimits {
        header_max: EXPERT_HEADER_MAX,
        payload_max: rows
            .min(EXPERT_ROWS_MAX)
            .saturating_mul(Dtype::F32.row_len(n_embd)),
    }
}

/// Their answers, of `values` floats at most.
pub(super) fn answers(values: usize) -> FrameLimits {
    FrameLimits {
        header_max: 1024,
        payload_max: values.saturating_mul(size_of::<f32>()),
    }
}

/// Appends a call's frame.
///
/// # Errors
/// A call that no holder would take.
pub(super) fn encode_call(id: u32, call: &ExpertCall, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let n_rows = call.hidden.len() / (call.n_embd as usize).max(1);
    out.reserve(size_of_val(call.hidden.as_slice()) + 64 + 8 * call.groups.len());
    // What does not fit its field becomes what the message's own check refuses.
    let groups = call.groups.iter().map(|group| ExpertGroup {
        expert: narrow(group.expert),
        rows: u8::try_from(group.rows.len()).unwrap_or(u8::MAX),
    });
    let rows = call.groups.iter().flat_map(|group| &group.rows);
    let header = ExpertAsk::Call(ExpertRows {
        id,
        layer: narrow(call.layer),
        form: form_out(call.form),
        n_embd: call.n_embd,
        n_rows: u16::try_from(n_rows).unwrap_or(u16::MAX),
        groups: groups.collect(),
        rows: rows.map(|row| narrow(*row)).collect(),
    });
    encode_frame(&header, out, |out| {
        activation::encode(&call.hidden, call.n_embd, Dtype::F32, out);
    })
}

fn narrow(value: u32) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

/// The call that a frame is.
///
/// # Errors
/// What the asker did wrong.
pub(super) fn decode_call(rows: &ExpertRows, payload: &[u8]) -> Result<ExpertCall, String> {
    if rows.payload_len() != Some(payload.len()) {
        let (n, n_embd, len) = (rows.n_rows, rows.n_embd, payload.len());
        return Err(format!("{n} rows of {n_embd} in {len} bytes"));
    }
    let form = form_in(rows.form).ok_or("an activation that is not known")?;
    let mut hidden = Vec::new();
    activation::decode(payload, rows.n_embd, Dtype::F32, &mut hidden)
        .map_err(|why| why.to_string())?;
    let mut left = rows.rows.as_slice();
    let mut groups = Vec::with_capacity(rows.groups.len());
    for group in &rows.groups {
        let (of_group, rest) = left
            .split_at_checked(group.rows.into())
            .ok_or("groups of more rows than are listed")?;
        left = rest;
        groups.push(Group {
            expert: group.expert.into(),
            rows: of_group.iter().copied().map(u32::from).collect(),
        });
    }
    Ok(ExpertCall {
        layer: rows.layer.into(),
        form,
        n_embd: rows.n_embd,
        groups,
        hidden,
    })
}

fn form_out(form: Form) -> ExpertForm {
    let (activation, alpha, limit) = match form.activation {
        Activation::SwiGlu => (0, 0.0, 0.0),
        Activation::GeGlu => (1, 0.0, 0.0),
        Activation::ReGlu => (2, 0.0, 0.0),
        Activation::GeGluErf => (3, 0.0, 0.0),
        Activation::GeGluQuick => (4, 0.0, 0.0),
        Activation::SwiGluOai { alpha, limit } => (5, alpha, limit),
        Activation::SwiGluClamp { limit } => (6, 0.0, limit),
        Activation::SiluLimited { limit } => (7, 0.0, limit),
        Activation::Silu => (8, 0.0, 0.0),
        Activation::Gelu => (9, 0.0, 0.0),
        Activation::Relu => (10, 0.0, 0.0),
        Activation::ReluSquared => (11, 0.0, 0.0),
    };
    ExpertForm {
        activation,
        alpha,
        limit,
        parts: form.parts.bits(),
    }
}

fn form_in(form: ExpertForm) -> Option<Form> {
    let (alpha, limit) = (form.alpha, form.limit);
    let activation = match form.activation {
        0 => Activation::SwiGlu,
        1 => Activation::GeGlu,
        2 => Activation::ReGlu,
        3 => Activation::GeGluErf,
        4 => Activation::GeGluQuick,
        5 => Activation::SwiGluOai { alpha, limit },
        6 => Activation::SwiGluClamp { limit },
        7 => Activation::SiluLimited { limit },
        8 => Activation::Silu,
        9 => Activation::Gelu,
        10 => Activation::Relu,
        11 => Activation::ReluSquared,
        _ => return None,
    };
    let parts = Parts::from_bits(form.parts)?;
    Some(Form { activation, parts })
}

/// What a holder says instead of rows.
pub(super) fn refusal(why: ExpertError) -> ExpertRefusal {
    match why {
        ExpertError::NotHeld { expert, .. } => ExpertRefusal::NotHeld {
            expert: narrow(expert),
        },
        ExpertError::Busy { .. } => ExpertRefusal::Busy,
        ExpertError::Call(_) | ExpertError::OtherTensors { .. } => {
            ExpertRefusal::Call(text(why.to_string()))
        }
        ExpertError::Reply { .. } | ExpertError::Backend(_) => {
            ExpertRefusal::Failed(text(why.to_string()))
        }
    }
}

/// A text as long as one may be.
pub(super) fn text(mut why: String) -> String {
    cut_text(&mut why, WHY_BYTES_MAX);
    why
}

/// Some of a call's groups, by index, with the rows that they take.
pub(super) fn part_of(call: &ExpertCall, groups: &[usize]) -> ExpertCall {
    let n_embd = call.n_embd as usize;
    let mut hidden = Vec::new();
    let mut sent: Vec<u32> = Vec::new();
    let picked = groups.iter().filter_map(|at| call.groups.get(*at));
    let groups = picked.map(|group| {
        let mut place = |row: &u32| {
            let at = sent.iter().position(|known| known == row);
            at.unwrap_or_else(|| {
                sent.push(*row);
                let start = *row as usize * n_embd;
                hidden.extend_from_slice(call.hidden.get(start..start + n_embd).unwrap_or(&[]));
                sent.len() - 1
            }) as u32
        };
        Group {
            expert: group.expert,
            rows: group.rows.iter().map(&mut place).collect(),
        }
    });
    let groups = groups.collect();
    ExpertCall {
        layer: call.layer,
        form: call.form,
        n_embd: call.n_embd,
        groups,
        hidden,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use swarm_proto::{FrameDecoder, decode_header};

    use super::*;

    pub(in crate::experts) fn call(groups: &[(u32, &[u32])], n_rows: u32) -> ExpertCall {
        ExpertCall {
            layer: 3,
            form: Form {
                activation: Activation::SwiGlu,
                parts: Parts::default(),
            },
            n_embd: 2,
            groups: groups
                .iter()
                .map(|(expert, rows)| Group {
                    expert: *expert,
                    rows: rows.to_vec(),
                })
                .collect(),
            hidden: (0..2 * n_rows).map(|i| i as f32).collect(),
        }
    }

    fn there_and_back(call: &ExpertCall) -> ExpertCall {
        let mut bytes = Vec::new();
        encode_call(9, call, &mut bytes).unwrap();
        let mut decoder = FrameDecoder::new(calls(call.n_embd, 8));
        decoder.push(&bytes);
        let (header, payload) = decoder.next().unwrap().unwrap();
        let ExpertAsk::Call(rows) = decode_header(decoder.bytes(header)).unwrap() else {
            panic!("not a call");
        };
        assert_eq!(rows.id, 9);
        decode_call(&rows, decoder.bytes(payload)).unwrap()
    }

    #[test]
    fn calls_arrive_as_they_were_sent() {
        let limit = 0.5;
        for activation in [
            Activation::SwiGlu,
            Activation::GeGlu,
            Activation::ReGlu,
            Activation::GeGluErf,
            Activation::GeGluQuick,
            Activation::SwiGluOai { alpha: 1.7, limit },
            Activation::SwiGluClamp { limit },
            Activation::SiluLimited { limit },
            Activation::Silu,
            Activation::Gelu,
            Activation::Relu,
            Activation::ReluSquared,
        ] {
            let mut call = call(&[(1, &[0, 2]), (900, &[1])], 3);
            call.form.activation = activation;
            call.form.parts = Parts::from_bits(0x249).unwrap();
            assert_eq!(there_and_back(&call), call);
        }
        let mut wild = call(&[(70_000, &[0])], 1);
        assert!(encode_call(0, &wild, &mut Vec::new()).is_err());
        wild.groups[0].expert = 1;
        wild.layer = u32::MAX;
        assert_eq!(there_and_back(&wild).layer, 65_535, "no model has it");
    }

    #[test]
    fn a_part_has_the_rows_that_it_takes() {
        let whole = call(&[(1, &[0, 2]), (4, &[1]), (5, &[2, 1])], 3);
        let part = part_of(&whole, &[0, 2]);
        assert_eq!(part.groups[0].rows, [0, 1]);
        assert_eq!(part.groups[1].rows, [1, 2]);
        assert_eq!(part.hidden, [0.0, 1.0, 4.0, 5.0, 2.0, 3.0]);
        assert_eq!(part_of(&whole, &[1]).hidden, [2.0, 3.0]);
    }
}
