//! Lawful inputs to begin from: mutations of them reach deeper than noise does.

use gguf::{Array, Header, TensorInfo, TensorType, Text, Value};
use swarm_proto::{codec, *};

/// Lawful inputs of a target.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "gguf_header" => vec![model()],
        "frame" => vec![frames()],
        "down" => vec![
            encoded(&Down::Open(open())),
            encoded(&Down::Rows(rows())),
            encoded(&Down::Close),
        ],
        "up" => vec![
            encoded(&Up::Opened {
                n_embd: 64,
                n_vocab: 300,
                held: 70,
            }),
            encoded(&Up::Ack {
                epoch: Epoch(1),
                pos_end: 7000,
            }),
            encoded(&Up::Working),
            encoded(&Up::Failed(failure())),
            encoded(&Up::Lost {
                epoch: Epoch(1),
                failure: failure(),
            }),
        ],
        "attach" => vec![encoded(&Attach {
            session: SessionId([3; 16]),
            epoch: Epoch(1),
        })],
        "answer" => vec![
            encoded(&Answer::Attached),
            encoded(&Answer::Failed(failure())),
            encoded(&Answer::Logits(Logits {
                epoch: Epoch(0),
                pos: 9,
                n_vocab: 32_000,
                form: LogitsForm::Top { k: 256, lse: 3.5 },
                spent_us: 80,
            })),
        ],
        "fetch" => vec![
            encoded(&Fetch::Snapshot),
            encoded(&Fetch::Manifest(ModelId(Hash([1; 32])))),
            encoded(&Fetch::Shard(ShardId(Hash([1; 32])))),
        ],
        "found" => vec![
            encoded(&Found::Bytes { len: 70_000 }),
            encoded(&Found::Failed("no".into())),
        ],
        "ask" => vec![encoded(&Ask {
            model: ModelId(Hash([1; 32])),
            shard: ShardId(Hash([2; 32])),
            first: 70_000,
            groups: 64,
            shares: true,
            in_vain: false,
        })],
        "give" => vec![
            encoded(&Give::Part),
            encoded(&Give::Elsewhere {
                peers: vec![Peer([1; 32]), Peer([2; 32])],
            }),
            encoded(&Give::Failed("no".into())),
        ],
        "expert_ask" => vec![
            encoded(&ExpertAsk::Hello {
                model: ModelId(Hash([1; 32])),
            }),
            encoded(&ExpertAsk::Call(expert_rows())),
            encoded(&ExpertAsk::Ping(7)),
        ],
        "expert_give" => vec![
            encoded(&ExpertGive::Serving { n_embd: 2048 }),
            encoded(&ExpertGive::Refused("no".into())),
            encoded(&ExpertGive::Rows {
                id: 3,
                spent_us: 700,
            }),
            encoded(&ExpertGive::Failed {
                id: 3,
                why: ExpertRefusal::NotHeld { expert: 9 },
            }),
        ],
        "snapshot" => vec![
            encode_snapshot(&signed()),
            encode_snapshot(signed().iter().chain(&signed())),
        ],
        "advert" => {
            let signed = signed().into_iter();
            signed
                .flat_map(|signed| [signed.bytes.clone(), signed.to_bytes()])
                .collect()
        }
        "ticket" => vec![ticket()],
        "manifest" => manifest().into_iter().collect(),
        "activation" => vec![activations(0), activations(1), activations(2)],
        _ => vec![],
    }
}

fn encoded<M: Message>(message: &M) -> Vec<u8> {
    let mut out = Vec::new();
    codec::encode(message, &mut out).expect("a lawful message");
    out
}

fn open() -> Open {
    let hop = |n, start, end| Hop {
        peer: Peer([n; 32]),
        addrs: vec![
            "/ip4/127.0.0.1/tcp/4001".into(),
            "/ip4/127.0.0.1/udp/4001/quic-v1".into(),
        ],
        layers: LayerRange { start, end },
    };
    Open {
        session: SessionId([3; 16]),
        epoch: Epoch(2),
        resume: 77,
        since: Epoch(0),
        fork: None,
        client: Peer([9; 32]),
        model: ModelId(Hash([7; 32])),
        n_ctx: 4096,
        dtype: Dtype::Q8_0,
        numerics: swarm_proto::Numerics::Exact,
        hops: vec![hop(1, 0, 2), hop(2, 2, 300), hop(3, 300, 301)],
        at: 1,
        standbys: Standbys {
            peers: vec![Standby {
                at: 2,
                peer: Peer([4; 32]),
                addrs: vec!["/ip4/127.0.0.1/tcp/4002".into()],
            }],
            batch: 16,
        },
        standing_by: false,
        trace: Some(TraceParent::new([1; 16], [2; 8], true)),
    }
}

fn rows() -> Rows {
    Rows {
        session: SessionId([3; 16]),
        epoch: Epoch(0),
        pos0: 300,
        n_rows: 32,
        content: Content::Hidden(Dtype::Bf16),
        want: Want {
            rows: WantRows::Last,
            form: Form::Top(256),
        },
        spent_us: 70_000,
    }
}

fn expert_rows() -> ExpertRows {
    let group = |expert, rows| ExpertGroup { expert, rows };
    ExpertRows {
        id: 70_000,
        layer: 300,
        form: ExpertForm {
            activation: 5,
            alpha: 1.7,
            limit: 7.0,
            parts: 0x249,
        },
        n_embd: 2048,
        n_rows: 2,
        groups: vec![group(3, 2), group(900, 1)],
        rows: vec![0, 1, 1],
    }
}

fn failure() -> Failure {
    Failure::new(
        2,
        Fault::Peer,
        FailureCode::Deadline,
        "no frame within 100 ms",
    )
}

fn frames() -> Vec<u8> {
    let mut out = Vec::new();
    for message in [Down::Open(open()), Down::Rows(rows()), Down::Close] {
        let payload = |out: &mut Vec<u8>| out.extend_from_slice(&[5; 200]);
        encode_frame(&message, &mut out, payload).expect("a lawful frame");
    }
    out
}

fn signed() -> Vec<SignedAdvert> {
    let secret = [5; 32];
    let figure = |value| Some(Measured { value, age_s: 3 });
    let advert = Advert {
        peer: Peer::of_secret(&secret),
        seq: 1_700_000_000_000,
        ttl_ms: 45_000,
        addrs: vec!["/ip4/127.0.0.1/tcp/4001".into()],
        models: vec![ModelAdvert {
            model: ModelId(Hash([7; 32])),
            name: "demo".into(),
            n_layer: 8,
            live: vec![LayerRange { start: 0, end: 3 }],
            intended: vec![LayerRange { start: 0, end: 5 }],
            layer_tokens_s: figure(4000.0),
            n_ctx_max: 1024,
            free_cells: 4096,
            n_embd: 256,
            numerics: 77,
            stored: vec![LayerRange { start: 0, end: 8 }],
            layer_bytes_max: None,
            experts: None,
        }],
        uplink_bytes_s: figure(1e7),
        queue: 2,
        rtts: vec![(Peer([2; 32]), 900)],
        leaving: false,
        agent: "shoal/0.1.0".into(),
    };
    let swarm = "fuzz".parse().expect("a lawful name");
    vec![SignedAdvert::sign(&advert, &swarm, &secret).expect("a lawful advert")]
}

fn ticket() -> Vec<u8> {
    let ticket = Ticket {
        swarm: "fuzz".parse().expect("a lawful name"),
        key: Some([1; 32]),
        addrs: vec![format!("/ip4/127.0.0.1/tcp/4001/p2p/{}", Peer([1; 32]))],
    };
    ticket.to_text().expect("a lawful ticket").into_bytes()
}

fn activations(dtype: u8) -> Vec<u8> {
    let kind = [Dtype::F32, Dtype::Bf16, Dtype::Q8_0][usize::from(dtype)];
    let mut out = vec![dtype, 33];
    let values: Vec<f32> = (0..66).map(|i| i as f32 - 30.0).collect();
    swarm_proto::activation::encode(&values, 33, kind, &mut out);
    out
}

/// A whole GGUF of a tiny mixture of experts.
fn model() -> Vec<u8> {
    let texts = (0..60)
        .map(|i| Text::from(format!("token {i:020}")))
        .collect();
    let kv = vec![
        ("general.architecture".into(), Value::from("llama")),
        ("llama.block_count".into(), Value::U32(1)),
        ("llama.embedding_length".into(), Value::U32(32)),
        ("llama.expert_count".into(), Value::U32(2)),
        ("llama.rope.freq_base".into(), Value::F32(10_000.0)),
        ("llama.head_count".into(), Value::Array(Array::I32(vec![4]))),
        (
            "tokenizer.ggml.tokens".into(),
            Value::Array(Array::Str(texts)),
        ),
    ];
    let tensor = |name: &str, dims: &[u64], ty| TensorInfo {
        name: name.into(),
        dims: dims.to_vec(),
        ty,
        offset: 0,
    };
    let tensors = vec![
        tensor("token_embd.weight", &[32, 60], TensorType::Q8_0),
        tensor("blk.0.attn_q.weight", &[32, 8], TensorType::F16),
        tensor("blk.0.ffn_up_exps.weight", &[32, 4, 2], TensorType::Q4_0),
        tensor("output_norm.weight", &[32], TensorType::F32),
    ];
    let header = Header::new(32, kv, tensors).expect("a lawful header");
    let mut out = Vec::new();
    header.write(&mut out).expect("memory takes anything");
    for tensor in &header.tensors {
        let n_bytes = tensor.n_bytes().expect("a lawful tensor");
        out.resize(out.len() + (n_bytes + header.padding(n_bytes)) as usize, 1);
    }
    out
}

fn manifest() -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().ok()?;
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, model()).ok()?;
    let store = shard_registry::Store::open(folder.path()).ok()?;
    let id = store.import(&path, None, &mut |_| {}).ok()?.id;
    store.manifest_bytes(id).ok()
}
