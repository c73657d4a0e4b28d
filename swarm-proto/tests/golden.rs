//! The bytes of every message, written down: a change here is a new protocol version.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use swarm_proto::{codec, *};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn golden<M: Message + PartialEq + std::fmt::Debug>(message: &M, expected: &str) {
    let mut bytes = Vec::new();
    codec::encode(message, &mut bytes).unwrap();
    assert_eq!(
        hex(&bytes),
        expected.replace([' ', '\n'], ""),
        "{message:?}"
    );
    assert_eq!(&codec::decode::<M>(&bytes).unwrap(), message);
}

fn range(text: &str) -> LayerRange {
    text.parse().unwrap()
}

const SESSION: SessionId = SessionId([0x5e; 16]);
const S: &str = "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e";

#[test]
fn session_opens_and_closes() {
    let hop = |byte, layers| Hop {
        peer: Peer([byte; 32]),
        addrs: vec!["/ip4/1.2.3.4/tcp/9".into()],
        layers: range(layers),
    };
    let open = Open {
        session: SESSION,
        epoch: Epoch(1),
        resume: 7,
        since: Epoch(1),
        fork: None,
        client: Peer([0xcc; 32]),
        model: ModelId(Hash([0xab; 32])),
        n_ctx: 1024,
        dtype: Dtype::Q8_0,
        numerics: Numerics::Fast,
        hops: vec![hop(1, "0..2"), hop(2, "2..300")],
        at: 1,
        standbys: Standbys {
            peers: vec![Standby {
                at: 1,
                peer: Peer([3; 32]),
                addrs: vec!["/ip4/1.2.3.4/tcp/9".into()],
            }],
            batch: 16,
        },
        standing_by: true,
        trace: Some(TraceParent::new([0x11; 16], [0x22; 8], true)),
    };
    let addr = "12 2f6970342f312e322e332e342f7463702f39";
    let expected = format!(
        "00 {S} 01 07 01 00 {} {} fb0004 02 01 02 {} 01 {addr} 00 02 {} 01 {addr} 02 fb2c01 01 \
         01 01 {} 01 {addr} 10 01 01 {} {} 01",
        "cc".repeat(32),
        "ab".repeat(32),
        "01".repeat(32),
        "02".repeat(32),
        "03".repeat(32),
        "11".repeat(16),
        "22".repeat(8),
    );
    golden(&Down::Open(open.clone()), &expected);
    let fork = Fork {
        session: SessionId([0x4f; 16]),
        epoch: Epoch(3),
        positions: 96,
    };
    let forked = Open {
        epoch: Epoch(0),
        resume: 0,
        since: Epoch(0),
        fork: Some(fork),
        ..open
    };
    let expected = expected.replacen(
        "01 07 01 00",
        &format!("00 00 00 01 {} 03 60", "4f".repeat(16)),
        1,
    );
    golden(&Down::Open(forked), &expected);
    golden(&Down::Close, "02");
}

#[test]
fn session_rows() {
    let rows = Rows {
        session: SESSION,
        epoch: Epoch(0),
        pos0: 70_000,
        n_rows: 2,
        content: Content::Hidden(Dtype::Bf16),
        want: Want {
            rows: WantRows::Last,
            form: Form::Top(256),
        },
        spent_us: 250,
    };
    golden(
        &Down::Rows(rows),
        &format!("01 {S} 00 fc70110100 02 01 01 01 00 fb0001 fa"),
    );
    let tokens = Rows {
        content: Content::Tokens,
        want: Want::NONE,
        pos0: 0,
        ..rows
    };
    golden(&Down::Rows(tokens), &format!("01 {S} 00 00 02 00 00 01 fa"));
    let normed = Rows {
        want: Want {
            rows: WantRows::All,
            form: Form::Normed,
        },
        ..tokens
    };
    golden(&Down::Rows(normed), &format!("01 {S} 00 00 02 00 02 02 fa"));
}

#[test]
fn session_replies() {
    golden(
        &Up::Opened {
            n_embd: 64,
            n_vocab: 300,
            held: 9,
        },
        "00 40 fb2c01 09",
    );
    golden(
        &Up::Ack {
            epoch: Epoch(1),
            pos_end: 7,
        },
        "01 01 07",
    );
    let failure = Failure::new(3, Fault::Local, FailureCode::Version, "é");
    golden(&Up::Failed(failure.clone()), "02 03 01 09 02c3a9");
    golden(
        &Up::Lost {
            epoch: Epoch(1),
            failure: failure.clone(),
        },
        "03 01 03 01 09 02c3a9",
    );
    golden(&Up::Working, "04");
    golden(&Answer::Failed(failure), "02 03 01 09 02c3a9");
}

#[test]
fn answers_and_fetches() {
    golden(
        &Attach {
            session: SESSION,
            epoch: Epoch(9),
        },
        &format!("{S} 09"),
    );
    golden(&Answer::Attached, "00");
    let logits = |form| Logits {
        epoch: Epoch(0),
        pos: 5,
        n_vocab: 32_000,
        form,
        spent_us: 1,
    };
    golden(
        &Answer::Logits(logits(LogitsForm::Top { k: 2, lse: 1.5 })),
        "01 00 05 fb007d 00 02 0000c03f 01",
    );
    golden(
        &Answer::Logits(logits(LogitsForm::Full)),
        "01 00 05 fb007d 01 01",
    );
    golden(
        &Answer::Logits(logits(LogitsForm::Normed)),
        "01 00 05 fb007d 02 01",
    );
    let hash = Hash([0xab; 32]);
    golden(&Fetch::Snapshot, "00");
    golden(&Fetch::Manifest(ModelId(hash)), &format!("01 {hash}"));
    golden(&Fetch::Shard(ShardId(hash)), &format!("02 {hash}"));
    golden(&Found::Bytes { len: 300 }, "00 fb2c01");
    golden(&Found::Chunk, "01");
    golden(&Found::Missing, "02");
    golden(&Found::Failed("no".into()), "03 02 6e6f");
    let ask = Ask {
        model: ModelId(hash),
        shard: ShardId(hash),
        first: 300,
        groups: 64,
        shares: true,
        in_vain: false,
    };
    golden(&ask, &format!("{hash}{hash} fb2c01 40 01 00"));
    golden(&Give::Part, "00");
    golden(&Give::Missing, "01");
    golden(&Give::Later, "02");
    let peers = vec![Peer([2; 32])];
    let two = "02".repeat(32);
    golden(&Give::Elsewhere { peers }, &format!("03 01 {two}"));
    golden(&Give::Failed("no".into()), "04 02 6e6f");
}

#[test]
fn a_frame() {
    let mut frame = Vec::new();
    encode_frame(&Found::Chunk, &mut frame, |out| {
        out.extend_from_slice(b"xyz")
    })
    .unwrap();
    assert_eq!(hex(&frame), "0600000001000178797a");
}

#[test]
fn calls_for_experts() {
    let hello = ExpertAsk::Hello {
        model: ModelId(Hash([0xab; 32])),
    };
    golden(&hello, &format!("00{}", "ab".repeat(32)));
    let call = ExpertAsk::Call(ExpertRows {
        id: 7,
        layer: 300,
        form: ExpertForm {
            activation: 5,
            alpha: 1.0,
            limit: 2.0,
            parts: 0x249,
        },
        n_embd: 64,
        n_rows: 2,
        groups: vec![
            ExpertGroup { expert: 3, rows: 2 },
            ExpertGroup {
                expert: 1000,
                rows: 1,
            },
        ],
        rows: vec![0, 1, 1],
    });
    golden(
        &call,
        "01 07 fb2c01 05 0000803f 00000040 fb4902 40 02 02 03 02 fbe803 01 03 00 01 01",
    );
    golden(&ExpertAsk::Ping(9), "02 09");
    golden(&ExpertGive::Serving { n_embd: 64 }, "00 40");
    golden(&ExpertGive::Refused("no".into()), "01 02 6e6f");
    let rows = ExpertGive::Rows {
        id: 7,
        spent_us: 300,
    };
    golden(&rows, "02 07 fb2c01");
    let failed = |why| ExpertGive::Failed { id: 7, why };
    golden(&failed(ExpertRefusal::NotHeld { expert: 3 }), "03 07 00 03");
    golden(&failed(ExpertRefusal::Busy), "03 07 01");
    golden(&failed(ExpertRefusal::Paused), "03 07 02");
    golden(&failed(ExpertRefusal::Call("x".into())), "03 07 03 01 78");
    golden(&failed(ExpertRefusal::Failed("x".into())), "03 07 04 01 78");
    golden(&ExpertGive::Working, "04");
    golden(&ExpertGive::Pong(9), "05 09");
}

fn advert() -> Advert {
    let secret = [7; 32];
    Advert {
        peer: Peer::of_secret(&secret),
        seq: 1_700_000_000_000,
        ttl_ms: 45_000,
        addrs: vec!["/ip4/1.2.3.4/tcp/9".into()],
        models: vec![ModelAdvert {
            model: ModelId(Hash([0xab; 32])),
            name: "demo".into(),
            n_layer: 6,
            live: vec![range("0..2")],
            intended: vec![range("0..3")],
            layer_tokens_s: Some(Measured {
                value: 2.0,
                age_s: 3,
            }),
            n_ctx_max: 1024,
            free_cells: 4096,
            n_embd: 64,
            numerics: 1,
            stored: vec![range("0..6")],
            layer_bytes_max: Some(3000),
            experts: Some(ExpertsAdvert {
                live: ExpertSpan::of([(1, 0), (1, 9), (2, 0), (2, 9)]),
                intended: Vec::new(),
                rows_s: None,
                island: vec![Peer([3; 32])],
                hot: vec![HotExpert {
                    layer: 1,
                    expert: 9,
                    per_mille: 250,
                }],
            }),
        }],
        uplink_bytes_s: None,
        queue: 0,
        rtts: vec![(Peer([2; 32]), 250)],
        leaving: false,
        agent: "shoal/0".into(),
    }
}

#[test]
fn an_advert_and_its_signature() {
    let advert = advert();
    let swarm = "home".parse().unwrap();
    let signed = SignedAdvert::sign(&advert, &swarm, &[7; 32]).unwrap();
    assert_eq!(
        hex(&signed.bytes),
        format!(
            "{}fd0068e5cf8b010000fbc8af0112{}01{}0464656d6f06010002010003010000004003fb0004fb00104001\
             01000601fbb80b01010103020102000001{}010109fa000001{}fa000773686f616c2f30",
            hex(&advert.peer.0),
            "2f6970342f312e322e332e342f7463702f39",
            "ab".repeat(32),
            "03".repeat(32),
            "02".repeat(32),
        )
    );
    assert_eq!(hex(&signed.signature), SIGNATURE);
    assert_eq!(signed.verify(&swarm).unwrap(), advert);
    assert_eq!(
        SignedAdvert::from_bytes(&signed.to_bytes()).unwrap(),
        signed
    );
    let snapshot = encode_snapshot([&signed, &signed]);
    assert_eq!(
        decode_snapshot(&snapshot).unwrap(),
        [signed.clone(), signed]
    );
}

/// ed25519 signatures are deterministic.
const SIGNATURE: &str = "b0a219cf0eb19fd50d23ce24b1043bd8e66140728551923ed968204a4148c809e62c37bac9ca71bed7bba3da30e1f44bb0a587655b7a4060b64ebdd815b5df00";

#[test]
fn a_ticket() {
    let ticket = Ticket {
        swarm: "home".parse().unwrap(),
        key: Some([9; 32]),
        addrs: vec![format!("/ip4/1.2.3.4/tcp/9/p2p/{}", Peer([1; 32]))],
    };
    let text = ticket.to_text().unwrap();
    assert_eq!(text, TICKET);
    assert_eq!(text.parse::<Ticket>().unwrap(), ticket);
    assert!(
        !format!("{ticket:?}").contains("9, 9"),
        "a key is not printed"
    );
}

const TICKET: &str = "shoal192fa9Qn7g8GLekJ7URzchB9G3A4BnBic3Ri7m3QUnkK778CAhZWaS2tRQ41DdgJLhYBCdNUYLq7kTVvN4gtDV5SmTJnZN41ipVq9uXf4EYMaKbKRQwG8ZL8yFzRqz3qkGojwe1HjTzihLyhAffS58FySypT8PdcSPM";

#[test]
fn names() {
    let swarm: SwarmId = "home".parse().unwrap();
    let model = ModelId(Hash([0xab; 32]));
    assert_eq!(swarm.session_protocol(), "/shoal/home/session/3");
    assert_eq!(swarm.answer_protocol(), "/shoal/home/answer/3");
    assert_eq!(swarm.fetch_protocol(), "/shoal/home/fetch/3");
    assert_eq!(swarm.transfer_protocol(), "/shoal/home/transfer/3");
    assert_eq!(swarm.experts_protocol(), "/shoal/home/experts/3");
    assert_eq!(swarm.kad_protocol(), "/shoal/home/kad/3");
    assert_eq!(swarm.identify_protocol(), "/shoal/home/3");
    assert_eq!(swarm.advert_topic(), "shoal/home/adverts/3");
    assert_eq!(
        swarm.model_advert_topic(&model),
        format!("shoal/home/adverts/3/{model}")
    );
    // The libp2p specification's form: base58 of an identity multihash of the protobuf key.
    let peer = Peer([1; 32]);
    assert!(peer.to_string().starts_with("12D3KooW"));
    assert_eq!(peer.to_string().parse::<Peer>().unwrap(), peer);
}
