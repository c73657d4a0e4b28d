//! What a bad peer may send: refused with a reason, at the length if the length is already wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use swarm_proto::{codec, *};

fn encoded<M: Message>(message: &M) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode(message, &mut bytes).unwrap();
    bytes
}

fn refusal<M: Message + std::fmt::Debug>(bytes: &[u8]) -> String {
    codec::decode::<M>(bytes).unwrap_err().to_string()
}

#[test]
fn unknown_kinds_are_named() {
    assert_eq!(
        refusal::<Down>(&[3]),
        "session message: unknown kind 3 of Down; is the sender newer?"
    );
    assert_eq!(
        refusal::<Fetch>(&[9]),
        "fetch request: unknown kind 9 of Fetch; is the sender newer?"
    );
    let mut rows = encoded(&Up::Failed(Failure::new(
        0,
        Fault::Peer,
        FailureCode::Full,
        "",
    )));
    rows[3] = 77;
    assert_eq!(
        refusal::<Up>(&rows),
        "session reply: unknown kind 77 of FailureCode; is the sender newer?"
    );
}

#[test]
fn bytes_missing_or_left_over() {
    let mut bytes = encoded(&Up::Ack {
        epoch: Epoch(1),
        pos_end: 7,
    });
    bytes.push(0);
    assert_eq!(
        refusal::<Up>(&bytes),
        "session reply of 3 bytes is followed by 1 more"
    );
    bytes.truncate(2);
    assert_eq!(
        refusal::<Up>(&bytes),
        "session reply ends after 2 bytes, more were announced"
    );
    let long = vec![0; 65];
    assert_eq!(
        refusal::<Attach>(&long),
        "attach message of 65 bytes, the limit is 64"
    );
}

/// A length inside a message is held against a limit before memory is taken for it.
#[test]
fn announced_lengths_are_refused_before_allocation() {
    // An open message that announces 2^60 hops after the fixed fields.
    let mut bytes = vec![0];
    bytes.extend([0x5e; 16]);
    bytes.extend([0, 0, 0, 0]);
    bytes.extend([0xcc; 32]);
    bytes.extend([0xab; 32]);
    bytes.extend([1, 0, 0]);
    let fixed = bytes.clone();
    bytes.push(253);
    bytes.extend((1u64 << 60).to_le_bytes());
    assert_eq!(
        refusal::<Down>(&bytes),
        "session message announces more than 262144 bytes of memory"
    );
    // 4000 hops would fit the claim and not the bytes: at most 256 KiB are taken, then it ends.
    bytes = fixed;
    bytes.push(251);
    bytes.extend(4000u16.to_le_bytes());
    assert_eq!(
        refusal::<Down>(&bytes),
        "session message ends after 91 bytes, more were announced"
    );
    // A text of 4 GiB.
    let bytes = [3, 252, 255, 255, 255, 255];
    assert_eq!(
        refusal::<Found>(&bytes),
        "fetch reply announces more than 262144 bytes of memory"
    );
}

/// A range that no shard has, or that no one should have to hold.
#[test]
fn absurd_ranges_and_too_many_names_are_refused() {
    let hash = Hash([1; 32]);
    let ask = |first: u32, groups: u32| {
        let number = |n: u32| [&[252][..], &n.to_le_bytes()].concat();
        let mut bytes = [hash.0, hash.0].concat();
        bytes.extend(number(first));
        bytes.extend(number(groups));
        bytes.extend([1, 0]);
        refusal::<Ask>(&bytes)
    };
    assert_eq!(ask(0, 0), "transfer request: a range of no groups");
    assert_eq!(
        ask(0, 257),
        "transfer request: groups of a range: 257, the limit is 256"
    );
    assert_eq!(
        ask(0, u32::MAX),
        "transfer request: groups of a range: 4294967295, the limit is 256"
    );
    assert_eq!(
        ask(u32::MAX, 2),
        "transfer request: a range from group 4294967295"
    );
    let mut nine = vec![3, 9];
    nine.extend([7; 9 * 32]);
    assert_eq!(
        refusal::<Give>(&nine),
        "transfer reply: peers named: 9, the limit is 8"
    );
    assert_eq!(
        refusal::<Give>(&[3, 252, 255, 255, 255, 255]),
        "transfer reply announces more than 262144 bytes of memory"
    );
    assert_eq!(
        refusal::<Give>(&[5]),
        "transfer reply: unknown kind 5 of Give; is the sender newer?"
    );
}

/// A call that no trunk sends is refused by its header, before its rows are looked at.
#[test]
fn calls_for_experts_that_cannot_be() {
    let group = |expert, rows| ExpertGroup { expert, rows };
    let call = ExpertRows {
        id: 0,
        layer: 0,
        form: ExpertForm {
            activation: 0,
            alpha: 0.0,
            limit: 0.0,
            parts: 0,
        },
        n_embd: 64,
        n_rows: 2,
        groups: vec![group(3, 2), group(4, 1)],
        rows: vec![0, 1, 1],
    };
    assert_eq!(ExpertAsk::Call(call.clone()).check(), Ok(()));
    assert_eq!(call.payload_len(), Some(512));
    let wrongs: [fn(&mut ExpertRows); 14] = [
        |c| c.form.activation = 12,
        |c| c.form.parts = 4096,
        |c| c.form.alpha = f32::NAN,
        |c| c.form.limit = f32::INFINITY,
        |c| c.n_embd = 0,
        |c| c.n_rows = 0,
        |c| c.n_rows = 2049,
        |c| c.n_rows = 1,
        |c| c.groups.clear(),
        |c| c.groups[1].expert = 3,
        |c| c.groups[1].expert = 1024,
        |c| c.groups[0].rows = 0,
        |c| c.groups[0].rows = 33,
        |c| c.rows.push(0),
    ];
    for (i, wrong) in wrongs.into_iter().enumerate() {
        let mut call = call.clone();
        wrong(&mut call);
        // As a peer writes it that checks nothing.
        let config = bincode::config::standard();
        let bytes = bincode::encode_to_vec(ExpertAsk::Call(call), config).unwrap();
        let why = refusal::<ExpertAsk>(&bytes);
        assert!(why.starts_with("call for experts: "), "{i}: {why}");
    }
    // 2^60 groups, and an answer's text of 4 GiB.
    let mut bytes = vec![1, 0, 0, 0];
    bytes.extend([0; 8]);
    bytes.extend([0, 64, 2, 253]);
    bytes.extend((1u64 << 60).to_le_bytes());
    assert_eq!(
        refusal::<ExpertAsk>(&bytes),
        "call for experts announces more than 262144 bytes of memory"
    );
    assert_eq!(
        refusal::<ExpertGive>(&[1, 252, 255, 255, 255, 255]),
        "answer of experts announces more than 262144 bytes of memory"
    );
    assert_eq!(
        refusal::<ExpertGive>(&[3, 0, 5]),
        "answer of experts: unknown kind 5 of ExpertRefusal; is the sender newer?"
    );
}

fn open(layers: &[(u16, u16)]) -> Open {
    let hop = |(start, end): &(u16, u16)| Hop {
        peer: Peer([1; 32]),
        addrs: vec![],
        layers: LayerRange {
            start: *start,
            end: *end,
        },
    };
    Open {
        session: SessionId([0; 16]),
        epoch: Epoch(0),
        resume: 0,
        since: Epoch(0),
        fork: None,
        client: Peer([0; 32]),
        model: ModelId(Hash([0; 32])),
        n_ctx: 16,
        dtype: Dtype::F32,
        numerics: swarm_proto::Numerics::Exact,
        hops: layers.iter().map(hop).collect(),
        at: 0,
        standbys: Standbys::default(),
        standing_by: false,
        trace: None,
    }
}

#[test]
fn forks_that_are_none() {
    let why = |session: u8, epoch: u32, positions: u32| {
        let mut open = open(&[(0, 4)]);
        open.epoch = Epoch(epoch);
        open.fork = Some(Fork {
            session: SessionId([session; 16]),
            epoch: Epoch(u32::MAX),
            positions,
        });
        open.check(4).err().map(|e| e.to_string())
    };
    assert_eq!(why(1, 0, 16), None);
    let expected = "a session of 16 positions forked at 17";
    assert!(why(1, 0, 17).unwrap().contains(expected));
    assert!(why(1, 0, u32::MAX).unwrap().contains("forked at"));
    assert!(why(0, 0, 16).unwrap().contains("forked from itself"));
    assert!(why(1, 1, 16).unwrap().contains("forked in epoch 1"));
}

#[test]
fn standbys_that_are_none() {
    let why = |at: &[u8], peer: u8| {
        let standby = |at: &u8| Standby {
            at: *at,
            peer: Peer([peer + at; 32]),
            addrs: vec![],
        };
        let mut open = open(&[(0, 2), (2, 4)]);
        open.standbys.peers = at.iter().map(standby).collect();
        open.check(4).err().map(|e| e.to_string())
    };
    assert_eq!(why(&[0, 1], 7), None);
    assert_eq!(why(&[2], 7).unwrap(), "a standby for hop 2 of 2");
    assert_eq!(why(&[1, 1], 7).unwrap(), "a standby for hop 1 of 2");
    let twice = "the standby for hop 0 has another part in the route";
    assert_eq!(why(&[0], 1).unwrap(), twice);
    assert!(why(&[0; 17], 7).unwrap().contains("standbys of a route"));
}

#[test]
fn routes_that_are_none() {
    let why = |open: &Open| open.check(4).unwrap_err().to_string();
    assert_eq!(open(&[(0, 2), (2, 4)]).check(4), Ok(()));
    assert_eq!(
        why(&open(&[(0, 2), (3, 4)])),
        "hop 1 of the route has layers 3..4, 2 comes next"
    );
    assert_eq!(
        why(&open(&[(0, 2), (1, 4)])),
        "hop 1 of the route has layers 1..4, 2 comes next"
    );
    assert_eq!(
        why(&open(&[(1, 4)])),
        "hop 0 of the route has layers 1..4, 0 comes next"
    );
    assert_eq!(
        why(&open(&[(0, 3)])),
        "the route ends at layer 3, the model has 4"
    );
    assert_eq!(why(&open(&[])), "hop 0 of a route of 0 hops");
    let many: Vec<_> = (0..129).map(|i| (i, i + 1)).collect();
    assert_eq!(why(&open(&many)), "hops of a route: 129, the limit is 128");
    let mut long = open(&[(0, 4)]);
    long.hops[0].addrs = vec!["x".repeat(129)];
    assert_eq!(why(&long), "bytes of an address: 129, the limit is 128");
    long.hops[0].addrs = vec![String::new(); 5];
    assert_eq!(why(&long), "addresses of a peer: 5, the limit is 4");
    let mut early = open(&[(0, 4)]);
    early.since = Epoch(1);
    assert_eq!(why(&early), "epoch 0 of a session that ran in 1");
    // An empty range is no range on the wire either.
    let mut bytes = encoded(&Down::Open(open(&[(0, 4)])));
    // Before `at`, no standbys, no batch, not standing by, no trace.
    let at = bytes.len() - 6;
    assert_eq!(bytes[at], 4);
    bytes[at] = 0;
    assert_eq!(
        refusal::<Down>(&bytes),
        "session message is malformed: empty layer range 0..0"
    );
}

#[test]
fn an_open_message_over_its_limit_is_not_sent() {
    let spans: Vec<_> = (0..128).map(|i| (i, i + 1)).collect();
    let mut large = open(&spans);
    large
        .hops
        .iter_mut()
        .for_each(|hop| hop.addrs = vec!["x".repeat(128); 4]);
    let mut out = vec![1, 2];
    let error = encode_frame(&Down::Open(large), &mut out, |_| {}).unwrap_err();
    assert!(error.to_string().ends_with("the limit is 61440"), "{error}");
    assert_eq!(out, [1, 2], "the buffer is as before");
}

#[test]
fn rows_out_of_bounds() {
    let rows = Rows {
        session: SessionId([0; 16]),
        epoch: Epoch(0),
        pos0: 0,
        n_rows: 1,
        content: Content::Tokens,
        want: Want::NONE,
        spent_us: 0,
    };
    let why = |rows| {
        let mut out = Vec::new();
        codec::encode(&Down::Rows(rows), &mut out)
            .unwrap_err()
            .to_string()
    };
    let top = |k| Want {
        rows: WantRows::All,
        form: Form::Top(k),
    };
    assert_eq!(
        why(Rows { n_rows: 0, ..rows }),
        "session message: a frame of 0 rows"
    );
    assert_eq!(
        why(Rows { n_rows: 33, ..rows }),
        "session message: rows of a frame: 33, the limit is 32"
    );
    assert_eq!(
        why(Rows {
            pos0: u32::MAX,
            ..rows
        }),
        "session message: rows beyond position 4294967295"
    );
    assert_eq!(
        why(Rows {
            want: top(0),
            ..rows
        }),
        "session message: the top 0 of the logits"
    );
    assert_eq!(
        why(Rows {
            want: top(5000),
            ..rows
        }),
        "session message: logits of a row: 5000, the limit is 4096"
    );
    let hidden = Rows {
        n_rows: 3,
        content: Content::Hidden(Dtype::Q8_0),
        ..rows
    };
    assert_eq!(hidden.payload_len(33), 3 * 68);
    assert_eq!(
        Rows {
            n_rows: 32,
            ..hidden
        }
        .payload_len(u32::MAX),
        32 * 134_217_728 * 34
    );
}

#[test]
fn frames_are_refused_by_their_length() {
    let limits = FrameLimits {
        header_max: 64,
        payload_max: 100,
    };
    let refuse = |bytes: &[u8]| {
        let mut decoder = FrameDecoder::new(limits);
        decoder.push(bytes);
        decoder.next().unwrap_err().to_string()
    };
    assert_eq!(
        refuse(&u32::MAX.to_le_bytes()),
        "frame of 4294967295 bytes, the limit here is 166"
    );
    assert_eq!(
        refuse(&[100, 0, 0, 0, 65, 0]),
        "frame header of 65 bytes, the limit here is 64"
    );
    assert_eq!(
        refuse(&[1, 0, 0, 0, 0, 0]),
        "frame of 1 bytes cannot hold a header of 0"
    );
    assert_eq!(
        refuse(&[103, 0, 0, 0, 0, 0]),
        "frame payload of 101 bytes, the limit here is 100"
    );
    let mut decoder = FrameDecoder::new(limits);
    decoder.push(&[200, 0, 0]);
    assert_eq!(decoder.next(), Ok(None));
    assert!(!decoder.is_empty());
    decoder.push(&[0]);
    assert!(decoder.next().is_err());
    decoder.set_limits(FrameLimits {
        header_max: 300,
        payload_max: 0,
    });
    assert_eq!(decoder.next(), Ok(None));
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    let mut out = vec![1.0];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
            let rows = [0.5, 0.5, 0.5, bad, 0.5, 0.5];
            let mut bytes = Vec::new();
            activation::encode(&rows, 3, dtype, &mut bytes);
            let error = activation::decode(&bytes, 3, dtype, &mut out).unwrap_err();
            assert_eq!(
                error,
                ActivationError::NotFinite { row: 1 },
                "{bad} {dtype}"
            );
        }
    }
    let mut bytes = Vec::new();
    activation::encode(&[1e30; 32], 32, Dtype::Q8_0, &mut bytes);
    assert!(
        activation::decode(&bytes, 32, Dtype::Q8_0, &mut out).is_err(),
        "too large for the scale"
    );
    for (len, n_embd) in [(13, 3), (1, 3), (4, 0)] {
        let error = activation::decode(&vec![0; len], n_embd, Dtype::F32, &mut out).unwrap_err();
        assert!(matches!(error, ActivationError::Length { .. }));
    }
    assert_eq!(out, [1.0], "nothing is left behind");
}

fn advert(secret: &[u8; 32]) -> Advert {
    Advert {
        peer: Peer::of_secret(secret),
        seq: 1,
        ttl_ms: 45_000,
        addrs: vec![],
        models: vec![ModelAdvert {
            model: ModelId(Hash([1; 32])),
            name: "demo".into(),
            n_layer: 6,
            live: vec![LayerRange { start: 0, end: 6 }],
            intended: vec![],
            layer_tokens_s: None,
            n_ctx_max: 1024,
            free_cells: 4096,
            n_embd: 64,
            numerics: 0,
            stored: Vec::new(),
            layer_bytes_max: None,
            experts: None,
        }],
        uplink_bytes_s: None,
        queue: 0,
        rtts: vec![],
        leaving: false,
        agent: String::new(),
    }
}

#[test]
fn adverts_that_are_forged() {
    let (ours, theirs): (SwarmId, SwarmId) = ("home".parse().unwrap(), "work".parse().unwrap());
    let signed = SignedAdvert::sign(&advert(&[1; 32]), &ours, &[1; 32]).unwrap();
    assert!(signed.verify(&ours).is_ok());
    assert!(
        matches!(signed.verify(&theirs), Err(AdvertError::Signature { .. })),
        "another swarm"
    );
    for i in 0..signed.bytes.len() {
        let mut changed = signed.clone();
        changed.bytes[i] ^= 1;
        assert!(changed.verify(&ours).is_err(), "byte {i}");
    }
    for i in 0..64 {
        let mut changed = signed.clone();
        changed.signature[i] ^= 0x10;
        assert!(
            matches!(changed.verify(&ours), Err(AdvertError::Signature { .. })),
            "byte {i}"
        );
    }
    let other = SignedAdvert::sign(&advert(&[1; 32]), &ours, &[2; 32]);
    assert!(
        matches!(other, Err(AdvertError::Signer { .. })),
        "somebody else's key"
    );
    let large = SignedAdvert {
        bytes: vec![0; 16 * 1024 + 1],
        signature: [0; 64],
    };
    assert_eq!(
        large.verify(&ours).unwrap_err().to_string(),
        "advert of 16385 bytes, the limit is 16384"
    );
    // The point of order 1: weak keys make signatures that hold for any message.
    let mut weak = signed.clone();
    weak.bytes[..32].fill(0);
    weak.bytes[0] = 1;
    weak.signature = [0; 64];
    weak.signature[0] = 1;
    assert!(weak.verify(&ours).is_err());
}

#[test]
fn adverts_that_cannot_be() {
    let why = |change: fn(&mut Advert)| {
        let mut advert = advert(&[1; 32]);
        change(&mut advert);
        let signed = SignedAdvert::sign(&advert, &"home".parse().unwrap(), &[1; 32]);
        signed.unwrap_err().to_string()
    };
    assert_eq!(
        why(|a| a.models[0].live = vec![LayerRange { start: 4, end: 7 }]),
        "advert: layers 4..7 of a model that has 6 layers"
    );
    assert_eq!(
        why(|a| a.models[0].intended = vec![LayerRange {
            start: 6,
            end: 60_000
        }]),
        "advert: layers 6..60000 of a model that has 6 layers"
    );
    assert_eq!(
        why(|a| a.ttl_ms = 120_001),
        "advert: time to live in ms: 120001, the limit is 120000"
    );
    assert_eq!(why(|a| a.ttl_ms = 0), "advert: a time to live of 0 ms");
    assert_eq!(
        why(|a| a.agent = "x".repeat(65)),
        "advert: bytes of the agent's text: 65, the limit is 64"
    );
    assert_eq!(
        why(|a| a.models = vec![a.models[0].clone(); 17]),
        "advert: models of a peer: 17, the limit is 16"
    );
    assert!(why(|a| a.models = vec![a.models[0].clone(); 2]).ends_with(" twice"));
    assert_eq!(
        why(|a| a.rtts = vec![(a.peer, 1); 65]),
        "advert: measured round trips: 65, the limit is 64"
    );
    for value in [f32::NAN, f32::INFINITY, -1.0] {
        let mut advert = advert(&[1; 32]);
        advert.uplink_bytes_s = Some(Measured { value, age_s: 0 });
        assert!(advert.check().is_err(), "{value}");
    }
}

#[test]
fn snapshots_that_are_torn() {
    let signed = SignedAdvert::sign(&advert(&[1; 32]), &"home".parse().unwrap(), &[1; 32]).unwrap();
    let bytes = encode_snapshot([&signed]);
    for len in 1..bytes.len() {
        assert!(decode_snapshot(&bytes[..len]).is_err(), "{len}");
    }
    assert_eq!(decode_snapshot(&[]), Ok(vec![]));
    assert!(
        decode_snapshot(&[0xff; 200]).is_err(),
        "an advert over its limit"
    );
    assert!(decode_snapshot(&vec![0; (16 << 20) + 1]).is_err());
    let empty = [0; 66].repeat(4097);
    assert!(
        decode_snapshot(&empty)
            .unwrap_err()
            .to_string()
            .contains("4096")
    );
}

#[test]
fn tickets_that_were_hurt() {
    let ticket = Ticket {
        swarm: "home".parse().unwrap(),
        key: None,
        addrs: vec![format!("/ip4/1.2.3.4/tcp/9/p2p/{}", Peer([1; 32]))],
    };
    let text = ticket.to_text().unwrap();
    assert_eq!(format!(" {text}\n").parse::<Ticket>().unwrap(), ticket);
    for i in 0..text.len() {
        let mut hurt = text.clone().into_bytes();
        hurt[i] = if hurt[i] == b'2' { b'3' } else { b'2' };
        assert!(
            String::from_utf8(hurt).unwrap().parse::<Ticket>().is_err(),
            "letter {i}"
        );
        assert!(text[..i].parse::<Ticket>().is_err(), "cut at {i}");
    }
    let why = |text: &str| text.parse::<Ticket>().unwrap_err().to_string();
    assert!(why("hello").starts_with("not a ticket"));
    assert_eq!(
        why(&"1".repeat(9000)),
        "ticket of 9000 letters, the limit is 8192"
    );
    let no_peer = Ticket {
        addrs: vec!["/ip4/1.2.3.4/tcp/9".into()],
        ..ticket
    };
    assert!(
        no_peer
            .to_text()
            .unwrap_err()
            .to_string()
            .contains("names no peer")
    );
}
