//! For any value: decode after encode gives it back. For any bytes: an answer, never a panic.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use proptest::prelude::*;
use swarm_proto::{codec, *};

fn both_ways<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
    let mut bytes = Vec::new();
    codec::encode(message, &mut bytes).unwrap();
    assert!(bytes.len() <= M::BYTES_MAX);
    assert_eq!(&codec::decode::<M>(&bytes).unwrap(), message);
    for len in 0..bytes.len() {
        assert!(codec::decode::<M>(&bytes[..len]).is_err(), "cut at {len}");
    }
}

/// What decodes at all encodes to something that decodes to the same.
fn any_bytes<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = codec::decode::<M>(bytes) {
        let mut again = Vec::new();
        codec::encode(&message, &mut again).unwrap();
        assert_eq!(codec::decode::<M>(&again).unwrap(), message);
    }
}

prop_compose! {
    fn route()(lengths in prop::collection::vec(1u16..9, 1..20), addr in "[a-z0-9/]{0,40}") -> Vec<Hop> {
        let mut start = 0;
        let hop = |len: u16| {
            let layers = LayerRange { start, end: start + len };
            start += len;
            Hop { peer: Peer([len as u8; 32]), addrs: vec![addr.clone(); usize::from(len % 5)], layers }
        };
        lengths.into_iter().map(hop).collect()
    }
}

prop_compose! {
    fn open()(
        hops in route(),
        session in any::<[u8; 16]>(),
        epoch in prop_oneof![Just(0), any::<u32>()],
        model in any::<[u8; 32]>(),
        n_ctx in 1u32..,
        at in any::<prop::sample::Index>(),
        trace in prop::option::of((any::<[u8; 16]>(), any::<[u8; 8]>(), any::<bool>())),
    ) -> Open {
        Open {
            session: SessionId(session),
            epoch: Epoch(epoch),
            resume: n_ctx - 1,
            since: Epoch(0),
            fork: (epoch == 0).then_some(Fork {
                session: SessionId(session.map(|byte| !byte)),
                epoch: Epoch(n_ctx),
                positions: n_ctx,
            }),
            client: Peer(model),
            model: ModelId(Hash(model)),
            n_ctx,
            dtype: [Dtype::F32, Dtype::Bf16, Dtype::Q8_0][epoch as usize % 3],
            numerics: [Numerics::Exact, Numerics::Fast][epoch as usize % 2],
            at: at.index(hops.len()) as u8,
            hops,
            standbys: Standbys::default(),
            standing_by: epoch % 2 == 1,
            trace: trace.map(|(t, s, sampled)| TraceParent::new(t, s, sampled)),
        }
    }
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        Just(Content::Tokens),
        Just(Content::Hidden(Dtype::F32)),
        Just(Content::Hidden(Dtype::Bf16)),
        Just(Content::Hidden(Dtype::Q8_0)),
    ]
}

proptest! {
    #[test]
    fn open_messages(open in open()) {
        prop_assert_eq!(open.check(open.hops.last().unwrap().layers.end), Ok(()));
        both_ways(&Down::Open(open));
    }

    #[test]
    fn rows(session: [u8; 16], epoch: u32, pos0 in 0..u32::MAX - u32::from(ROWS_MAX), n_rows in 1..=ROWS_MAX,
            content in content(), top in 0u16..4097, spent_us: u32) {
        let form = match top { 0 => Form::Full, 1 => Form::Normed, top => Form::Top(top) };
        let want = Want { rows: WantRows::All, form };
        let session = SessionId(session);
        both_ways(&Down::Rows(Rows { session, epoch: Epoch(epoch), pos0, n_rows, content, want, spent_us }));
    }

    #[test]
    fn replies(a: u32, b: u32, at: u8, text in ".{0,100}", lse in -1e30f32..1e30, k in 0u16..4097) {
        both_ways(&Up::Opened { n_embd: a, n_vocab: b, held: a });
        both_ways(&Up::Ack { epoch: Epoch(a), pos_end: b });
        let failure = Failure::new(at, Fault::Caller, FailureCode::Engine, text);
        both_ways(&Answer::Failed(failure));
        let form = match a % 3 { 0 => LogitsForm::Full, 1 => LogitsForm::Normed, _ => LogitsForm::Top { k, lse } };
        both_ways(&Answer::Logits(Logits { epoch: Epoch(a), pos: b, n_vocab: a, form, spent_us: b }));
        both_ways(&Found::Bytes { len: u64::from(a) % (64 << 20) });
    }

    #[test]
    fn transfers(hash: [u8; 32], first in 0..u32::MAX - 256, groups in 1u32..=256, shares: bool, in_vain: bool, n in 0usize..=8) {
        let (model, shard) = (ModelId(Hash(hash)), ShardId(Hash(hash)));
        both_ways(&Ask { model, shard, first, groups, shares, in_vain });
        both_ways(&Give::Elsewhere { peers: vec![Peer(hash); n] });
    }

    #[test]
    fn failures_always_fit(text in ".{0,2000}") {
        let failure = Failure::new(0, Fault::Peer, FailureCode::Full, text);
        both_ways(&Up::Failed(failure));
    }

    #[test]
    fn any_bytes_get_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        any_bytes::<Down>(&bytes);
        any_bytes::<Up>(&bytes);
        any_bytes::<Answer>(&bytes);
        any_bytes::<Attach>(&bytes);
        any_bytes::<Fetch>(&bytes);
        any_bytes::<Found>(&bytes);
        any_bytes::<Ask>(&bytes);
        any_bytes::<Give>(&bytes);
        any_bytes::<Advert>(&bytes);
        let _ = decode_snapshot(&bytes);
        let _ = SignedAdvert::from_bytes(&bytes).map(|signed| signed.verify(&"x".parse().unwrap()));
        let _ = String::from_utf8_lossy(&bytes).parse::<Ticket>();
    }

    /// However a stream is cut, the same frames come out.
    #[test]
    fn frames_of_any_cut(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..6),
                         cuts in prop::collection::vec(1usize..200, 1..40)) {
        let mut stream = Vec::new();
        for (payload, i) in payloads.iter().zip(0..) {
            let header = Up::Ack { epoch: Epoch(i), pos_end: 0 };
            encode_frame(&header, &mut stream, |out| out.extend_from_slice(payload)).unwrap();
        }
        let mut decoder = FrameDecoder::new(FrameLimits { header_max: 16, payload_max: 300 });
        let (mut rest, mut seen) = (&stream[..], 0);
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at(rest.len().min(*cut));
            decoder.push(now);
            rest = later;
            while let Some((header, payload)) = decoder.next().unwrap() {
                let header: Up = decode_header(decoder.bytes(header)).unwrap();
                prop_assert_eq!(header, Up::Ack { epoch: Epoch(seen), pos_end: 0 });
                prop_assert_eq!(decoder.bytes(payload), &payloads[seen as usize][..]);
                seen += 1;
            }
            if rest.is_empty() { break }
        }
        prop_assert_eq!(seen as usize, payloads.len());
        prop_assert!(decoder.is_empty());
    }

    #[test]
    fn any_stream_gets_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut decoder = FrameDecoder::new(FrameLimits { header_max: 40, payload_max: 100 });
        decoder.push(&bytes);
        while let Ok(Some((header, _))) = decoder.next() {
            let _ = decode_header::<Down>(decoder.bytes(header));
        }
    }

    /// Exact in f32, within the type's step in the others, for any size of row.
    #[test]
    fn activations(n_embd in 1u32..70, values in prop::collection::vec(-1e4f32..1e4, 0..400)) {
        let rows = &values[..values.len() / n_embd as usize * n_embd as usize];
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
            let (mut bytes, mut back) = (Vec::new(), Vec::new());
            activation::encode(rows, n_embd, dtype, &mut bytes);
            prop_assert_eq!(bytes.len(), rows.len() / n_embd as usize * dtype.row_len(n_embd));
            activation::decode(&bytes, n_embd, dtype, &mut back).unwrap();
            prop_assert_eq!(back.len(), rows.len());
            for (row, back) in rows.chunks(n_embd as usize).zip(back.chunks(n_embd as usize)) {
                for (block, back) in row.chunks(32).zip(back.chunks(32)) {
                    let largest = block.iter().fold(0f32, |max, x| max.max(x.abs()));
                    for (x, y) in block.iter().zip(back) {
                        let allowed = match dtype {
                            Dtype::F32 => 0.0,
                            Dtype::Bf16 => x.abs() / 256.0,
                            // Half a step, and the f16 scale's own rounding.
                            Dtype::Q8_0 => largest / 127.0 * 0.5 + largest / 1024.0 + 1e-4,
                        };
                        prop_assert!((x - y).abs() <= allowed, "{dtype}: {x} became {y}");
                    }
                }
            }
        }
    }

    #[test]
    fn any_payload_gets_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300), n_embd in 0u32..50) {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
            let mut out = Vec::new();
            let done = activation::decode(&bytes, n_embd, dtype, &mut out);
            prop_assert!(done.is_err() || out.iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn texts(bytes: [u8; 32], text in ".{0,80}") {
        prop_assert_eq!(Peer(bytes).to_string().parse::<Peer>().unwrap(), Peer(bytes));
        prop_assert_eq!(Hash(bytes).to_string().parse::<Hash>().unwrap(), Hash(bytes));
        let _ = text.parse::<Peer>();
        let _ = text.parse::<Hash>();
        let _ = text.parse::<SwarmId>();
        let _ = text.parse::<LayerRange>();
        let _ = format!("shoal1{text}").parse::<Ticket>();
    }
}
