//! What each fuzz target does with its input, as plain functions: hand it to a decoder, and hold
//! what comes out against what the decoder promises. A panic is a finding.

mod seeds;

use swarm_proto::{codec, *};

pub use seeds::seeds;

/// A target: its name, its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("gguf_header", gguf_header),
    ("frame", frame),
    ("down", down),
    ("up", up),
    ("attach", attach),
    ("answer", answer),
    ("fetch", fetch),
    ("found", found),
    ("ask", ask),
    ("give", give),
    ("expert_ask", expert_ask),
    ("expert_give", expert_give),
    ("snapshot", snapshot),
    ("advert", advert),
    ("ticket", ticket),
    ("manifest", manifest),
    ("activation", activation),
];

/// A header that is accepted can be written and is then read as the same.
pub fn gguf_header(data: &[u8]) {
    let len = data.len() as u64;
    let Ok(header) = gguf::Header::read(&mut std::io::Cursor::new(data), len) else {
        return;
    };
    for tensor in &header.tensors {
        let end = header.data_offset + tensor.offset + tensor.n_bytes().expect("it was checked");
        assert!(end <= len, "{} lies in the file", tensor.name);
    }
    let again = gguf::Header::new(header.alignment, header.kv.clone(), header.tensors.clone());
    let again = again.expect("its parts are lawful");
    let mut bytes = Vec::new();
    again.write(&mut bytes).expect("it can be written");
    let read = gguf::Header::read(&mut std::io::Cursor::new(&bytes), u64::MAX);
    // NaN is not equal to itself: compare what is written.
    let mut twice = Vec::new();
    read.expect("it can be read")
        .write(&mut twice)
        .expect("and written");
    assert_eq!(bytes, twice);
}

/// However the stream is cut the same frames come out, within the limits.
pub fn frame(data: &[u8]) {
    let limits = FrameLimits {
        header_max: 300,
        payload_max: 1000,
    };
    let cut = data.first().map_or(1, |first| usize::from(*first) % 50 + 1);
    assert_eq!(
        frames(data, limits, data.len().max(1)),
        frames(data, limits, cut)
    );
}

fn frames(data: &[u8], limits: FrameLimits, cut: usize) -> (Vec<Vec<u8>>, bool) {
    let mut decoder = FrameDecoder::new(limits);
    let mut out = Vec::new();
    for part in data.chunks(cut) {
        decoder.push(part);
        loop {
            match decoder.next() {
                Ok(None) => break,
                Err(_) => return (out, false),
                Ok(Some((header, payload))) => {
                    assert!(header.len() <= limits.header_max);
                    assert!(payload.len() <= limits.payload_max);
                    let _ = decode_header::<Down>(decoder.bytes(header.clone()));
                    out.push(decoder.bytes(header.start..payload.end).to_vec());
                }
            }
        }
    }
    (out, true)
}

/// What decodes encodes, and decodes to the same.
fn message<M: Message + std::fmt::Debug>(data: &[u8]) -> Option<M> {
    let message = codec::decode::<M>(data).ok()?;
    let mut bytes = Vec::new();
    codec::encode(&message, &mut bytes).expect("it was decoded");
    let again = codec::decode::<M>(&bytes).expect("it was encoded");
    assert_eq!(format!("{message:?}"), format!("{again:?}"));
    Some(message)
}

/// The session stream, down.
pub fn down(data: &[u8]) {
    match message(data) {
        Some(Down::Open(open)) => {
            let end = open.hops.last().map_or(0, |hop| hop.layers.end);
            open.check(end).expect("a route that decodes is contiguous");
            assert!(usize::from(open.at) < open.hops.len());
        }
        Some(Down::Rows(rows)) => {
            assert!((1..=ROWS_MAX).contains(&rows.n_rows));
            let _ = rows.payload_len(u32::MAX);
        }
        Some(Down::Close) | None => {}
    }
}

/// The session stream, up.
pub fn up(data: &[u8]) {
    message::<Up>(data);
}

/// The claim on a session's answers.
pub fn attach(data: &[u8]) {
    message::<Attach>(data);
}

/// The answer stream.
pub fn answer(data: &[u8]) {
    if let Some(Answer::Logits(logits)) = message(data) {
        let _ = logits.payload_len();
    }
}

/// A request for bytes.
pub fn fetch(data: &[u8]) {
    message::<Fetch>(data);
}

/// The reply to it.
pub fn found(data: &[u8]) {
    message::<Found>(data);
}

/// A request for groups of a shard.
pub fn ask(data: &[u8]) {
    if let Some(ask) = message::<Ask>(data) {
        assert!(!ask.range().is_empty());
    }
}

/// The reply to it.
pub fn give(data: &[u8]) {
    message::<Give>(data);
}

/// A call for experts.
pub fn expert_ask(data: &[u8]) {
    if let Some(ExpertAsk::Call(call)) = message(data) {
        assert!(call.rows.iter().all(|row| *row < call.n_rows));
        let _ = call.payload_len();
    }
}

/// The answer to it.
pub fn expert_give(data: &[u8]) {
    message::<ExpertGive>(data);
}

/// Adverts one after the other.
pub fn snapshot(data: &[u8]) {
    if let Ok(adverts) = decode_snapshot(data) {
        assert_eq!(encode_snapshot(&adverts), data);
    }
}

/// One advert, signed or not.
pub fn advert(data: &[u8]) {
    if let Some(advert) = message::<Advert>(data) {
        advert.check().expect("it was decoded");
    }
    if let (Ok(signed), Ok(swarm)) = (SignedAdvert::from_bytes(data), "fuzz".parse()) {
        let _ = signed.verify(&swarm);
    }
}

/// A ticket's text, as it is and behind its prefix.
pub fn ticket(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for text in [text.to_string(), format!("shoal1{text}")] {
        if let Ok(ticket) = text.parse::<Ticket>() {
            let again = ticket.to_text().expect("it was read");
            assert_eq!(again.parse::<Ticket>().as_ref(), Ok(&ticket));
        }
    }
}

/// A manifest: what is accepted is whole and in its only encoding.
pub fn manifest(data: &[u8]) {
    use shard_registry::Manifest;
    let Ok(manifest) = Manifest::decode(data) else {
        return;
    };
    manifest.check().expect("it was decoded");
    assert_eq!(manifest.encode().expect("it was decoded"), data);
    let header = manifest.header().expect("it was checked");
    assert_eq!(header.tensors.len(), manifest.tensors.len());
    for shard in &manifest.shards {
        for piece in &shard.pieces {
            let tensor = &manifest.tensors[piece.tensor as usize];
            assert!(
                piece.offset + piece.len <= tensor.bytes,
                "a piece lies in its tensor"
            );
        }
    }
}

/// Rows on the wire: the first byte is the type, the second the size of a row.
pub fn activation(data: &[u8]) {
    let Some(([dtype, n_embd], bytes)) = data.split_first_chunk() else {
        return;
    };
    let dtype = [Dtype::F32, Dtype::Bf16, Dtype::Q8_0][usize::from(*dtype) % 3];
    let n_embd = u32::from(*n_embd);
    let mut rows = Vec::new();
    if swarm_proto::activation::decode(bytes, n_embd, dtype, &mut rows).is_ok() {
        assert!(rows.iter().all(|x| x.is_finite()));
        let mut again = Vec::new();
        swarm_proto::activation::encode(&rows, n_embd, dtype, &mut again);
        assert_eq!(again.len(), bytes.len());
        if dtype != Dtype::Q8_0 {
            assert_eq!(again, bytes);
        }
    }
}
