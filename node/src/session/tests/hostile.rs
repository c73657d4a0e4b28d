//! Frames that no honest peer sends, at hops and at the client: a clear error on the right side,
//! nothing left behind.

use std::time::Duration;

use swarm_proto::{
    Answer, Attach, Content, Down, Dtype, Epoch, FailureCode, Fault, Form, FrameLimits, Logits,
    LogitsForm, Open, Peer, Rows, SessionId, Standbys, Up, Want, WantRows,
};
use tokio::io::AsyncWriteExt;

use super::swarm::*;
use crate::net::{Proto, Stream};
use crate::session::{ClientError, Deadlines, Kind, SessionLimits, wire::Pipe};

const SESSION: SessionId = SessionId([9; 16]);
/// Less than a frame's most rows.
const N_CTX: u32 = 20;
const WIDE: FrameLimits = FrameLimits {
    header_max: 65_535,
    payload_max: 1 << 20,
};

/// A hand-made peer: whatever it writes is its own.
async fn raw(swarm: &Swarm, from: Peer, to: usize, proto: Proto) -> Pipe {
    let stream = swarm
        .wires
        .dialer(from)
        .open(swarm.nodes[to].peer, &[], proto)
        .await
        .unwrap();
    Pipe::new(stream, WIDE)
}

fn open(swarm: &Swarm) -> Open {
    Open {
        session: SESSION,
        epoch: Epoch(0),
        resume: 0,
        since: Epoch(0),
        fork: None,
        client: CLIENT,
        model: MODEL,
        n_ctx: N_CTX,
        dtype: Dtype::F32,
        numerics: swarm_proto::Numerics::Exact,
        hops: swarm.route(),
        at: 0,
        standbys: Standbys::default(),
        standing_by: false,
        trace: None,
    }
}

fn rows(n_rows: u16) -> Rows {
    Rows {
        session: SESSION,
        epoch: Epoch(0),
        pos0: 0,
        n_rows,
        content: Content::Tokens,
        want: Want {
            rows: WantRows::Last,
            form: Form::Top(1),
        },
        spent_us: 0,
    }
}

async fn answer(pipe: &mut Pipe) -> Up {
    pipe.flush().await.unwrap();
    loop {
        match pipe.frame::<Up>().await.unwrap().expect("an answer") {
            Up::Working => {}
            answer => return answer,
        }
    }
}

async fn opened(pipe: &mut Pipe) {
    match answer(pipe).await {
        Up::Opened { .. } => {}
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(up: &Up, at: u8, fault: Fault, code: FailureCode) -> String {
    let (Up::Failed(failure) | Up::Lost { failure, .. }) = up else {
        panic!("{up:?}")
    };
    assert_eq!(
        (failure.at, failure.fault, failure.code),
        (at, fault, code),
        "{}",
        failure.message
    );
    failure.message.clone()
}

/// Openings that pass the codec's own checks, what each is refused with, and a word of the text.
fn bad_openings(good: &Open) -> Vec<(Open, Fault, FailureCode, &'static str)> {
    let with = |change: &dyn Fn(&mut Open)| {
        let mut open = good.clone();
        change(&mut open);
        open
    };
    let other_model = swarm_proto::ModelId(swarm_proto::Hash([1; 32]));
    let unknown = with(&|open| open.model = other_model);
    let not_held = with(&|open| {
        open.hops[0].layers.end = 6;
        open.hops[1].layers.start = 6;
    });
    let long = with(&|open| open.n_ctx = u32::MAX);
    let forged = with(&|open| open.client = peer(66));
    let elsewhere = with(&|open| open.hops[0].peer = peer(77));
    let other_hop = with(&|open| open.at = 1);
    let short = with(&|open| drop(open.hops.pop()));
    let (caller, bad) = (Fault::Caller, FailureCode::BadFrame);
    vec![
        (
            unknown,
            Fault::Local,
            FailureCode::UnknownModel,
            "not served",
        ),
        (not_held, Fault::Local, FailureCode::LayersNotHeld, "0..6"),
        (long, caller, FailureCode::Full, "4294967295"),
        (forged, caller, bad, "it came from"),
        (elsewhere, caller, bad, "this is"),
        (other_hop, caller, bad, "hop 1 of this route is"),
        (short, caller, bad, "the route ends at layer 4"),
    ]
}

#[tokio::test(start_paused = true)]
async fn bad_openings_are_refused_by_name() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 12]);
    for (open, fault, code, words) in bad_openings(&open(&swarm)) {
        let at = open.at;
        let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
        pipe.push(&Down::Open(open));
        let text = refused(&answer(&mut pipe).await, at, fault, code);
        assert!(text.contains(words), "{words}: {text}");
    }
    swarm.assert_empty().await;
}

/// The second hop takes the first one's word on who the client is: neither the places of everybody
/// nor those of a client can be used up by a member that invents clients.
#[tokio::test(start_paused = true)]
async fn a_member_that_invents_clients_gets_its_part_and_no_more() {
    let _clock = Clock::start();
    let limits = SessionLimits {
        sessions_max: 6,
        per_client_max: 2,
        per_upstream_max: 3,
        deadlines: Deadlines {
            // Nobody attaches here: the sessions must outlive the test.
            pair: Duration::from_secs(3600),
            ..Deadlines::default()
        },
        ..SessionLimits::default()
    };
    let swarm = Swarm::with(&[0, 4, 12], limits, |stage| stage);
    let open_as = async |upstream: Peer, client: Peer, n: u8| {
        let mut open = open(&swarm);
        (open.at, open.client, open.session) = (1, client, SessionId([n; 16]));
        open.hops[0].peer = upstream;
        let mut pipe = raw(&swarm, upstream, 1, Proto::Session).await;
        pipe.push(&Down::Open(open));
        let answer = answer(&mut pipe).await;
        (pipe, answer)
    };
    let (liar, honest) = (peer(66), peer(67));
    let mut open = Vec::new();
    for (n, client) in [(1, CLIENT), (2, CLIENT), (3, peer(101))] {
        let (pipe, up) = open_as(liar, client, n).await;
        assert!(matches!(up, Up::Opened { .. }), "{up:?}");
        open.push(pipe);
    }
    let (_, up) = open_as(liar, peer(102), 4).await;
    let text = refused(&up, 1, Fault::Local, FailureCode::Full);
    assert!(text.contains("peer before this hop"), "{text}");
    for n in 5..7 {
        let (pipe, up) = open_as(honest, CLIENT, n).await;
        assert!(matches!(up, Up::Opened { .. }), "{up:?}");
        open.push(pipe);
    }
    let (_, up) = open_as(honest, CLIENT, 7).await;
    let text = refused(&up, 1, Fault::Local, FailureCode::Full);
    assert!(text.contains("this client has 2"), "{text}");
    assert_eq!(swarm.nodes[1].sessions.count(), 5);
    drop(open);
    swarm.assert_empty().await;
}

/// An open session of the test's own, and its swarm.
async fn hop_zero() -> (Swarm, Pipe) {
    let swarm = Swarm::new(&[0, 4, 12]);
    let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
    pipe.push(&Down::Open(open(&swarm)));
    opened(&mut pipe).await;
    (swarm, pipe)
}

#[tokio::test(start_paused = true)]
async fn bad_frames_end_the_session_with_a_word() {
    let _clock = Clock::start();
    let with = |change: &dyn Fn(&mut Rows)| {
        let mut rows = rows(1);
        change(&mut rows);
        rows
    };
    let hidden = Content::Hidden(Dtype::F32);
    let cases = [
        (
            with(&|r| r.session = SessionId([1; 16])),
            4,
            "frame of session 0101",
        ),
        (with(&|r| r.epoch = Epoch(5)), 4, "frame of epoch 5"),
        (rows(3), 8, "payload of 8 bytes, 12 expected"),
        (rows(1), 400, "payload of 400 bytes, 4 expected"),
        (with(&|r| r.content = hidden), 192, "hidden states in f32"),
        (with(&|r| r.pos0 = 7), 4, "frame at position 7"),
        (rows(21), 84, "context of 20"),
    ];
    for (rows, bytes, words) in cases {
        let (swarm, mut pipe) = hop_zero().await;
        pipe.push_with(&Down::Rows(rows), |out| out.resize(out.len() + bytes, 0));
        let up = answer(&mut pipe).await;
        let text = refused(&up, 0, Fault::Caller, FailureCode::BadFrame);
        assert!(text.contains(words), "{words}: {text}");
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_our_encoder_would_not_write_is_refused() {
    let _clock = Clock::start();
    let (swarm, pipe) = hop_zero().await;
    let mut bytes = Vec::new();
    swarm_proto::encode_frame(&Down::Rows(rows(1)), &mut bytes, |_| {}).unwrap();
    // Lengths, kind, session, epoch and position come before the number of rows.
    let n_rows = 6 + 1 + 16 + 1 + 1;
    assert_eq!(bytes[n_rows], 1);
    bytes[n_rows] = 0;
    let mut stream = pipe.into_stream().unwrap();
    stream.write_all(&bytes).await.unwrap();
    let up = answer(&mut Pipe::new(stream, WIDE)).await;
    let text = refused(&up, 0, Fault::Caller, FailureCode::BadFrame);
    assert!(text.contains("0 rows"), "{text}");
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn nonsense_and_oversize_are_refused_before_they_are_kept() {
    let _clock = Clock::start();
    for bytes in [
        &[0xff_u8, 0xff, 0xff, 0x7f, 4, 0][..],
        &[
            10, 0, 0, 0, 8, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        ][..],
        &[2, 0, 0, 0, 200, 0][..],
    ] {
        for after in [false, true] {
            let swarm = Swarm::new(&[0, 12]);
            let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
            if after {
                pipe.push(&Down::Open(open(&swarm)));
                opened(&mut pipe).await;
            }
            let mut stream = pipe.into_stream().unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut pipe = Pipe::new(stream, WIDE);
            refused(
                &answer(&mut pipe).await,
                0,
                Fault::Caller,
                FailureCode::BadFrame,
            );
            swarm.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_frame_of_more_rows_than_a_step_is_refused_by_its_length() {
    let _clock = Clock::start();
    let (swarm, pipe) = hop_zero().await;
    // What 32 rows in f32 and the largest header, an opening's, come to, and a byte.
    let longest = 2 + swarm_proto::session::OPEN_BYTES_MAX as u32 + 32 * N_EMBD * 4;
    let mut stream = pipe.into_stream().unwrap();
    stream
        .write_all(&(longest + 1).to_le_bytes())
        .await
        .unwrap();
    let up = answer(&mut Pipe::new(stream, WIDE)).await;
    let text = refused(&up, 0, Fault::Caller, FailureCode::BadFrame);
    assert!(
        text.contains(&format!("the limit here is {longest}")),
        "{text}"
    );
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_token_beyond_the_vocabulary_and_rows_with_nan_reach_no_engine() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 4, 12]);
    let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
    pipe.push(&Down::Open(open(&swarm)));
    opened(&mut pipe).await;
    pipe.push_with(&Down::Rows(rows(1)), |out| {
        out.extend(u32::MAX.to_le_bytes())
    });
    let text = refused(
        &answer(&mut pipe).await,
        0,
        Fault::Caller,
        FailureCode::BadFrame,
    );
    assert!(text.contains("4294967295"), "{text}");
    swarm.assert_empty().await;

    // The second hop's upstream is hop 1 itself, here played by the test.
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut pipe = raw(&swarm, peer(1), 1, Proto::Session).await;
        pipe.push(&Down::Open(Open {
            at: 1,
            ..open(&swarm)
        }));
        opened(&mut pipe).await;
        let header = Rows {
            content: Content::Hidden(Dtype::F32),
            ..rows(1)
        };
        pipe.push_with(&Down::Rows(header), |out| {
            out.extend(std::iter::repeat_n(0, 47 * 4));
            out.extend(value.to_le_bytes());
        });
        refused(
            &answer(&mut pipe).await,
            1,
            Fault::Caller,
            FailureCode::BadFrame,
        );
        swarm.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn rows_before_opening_and_a_second_opening_are_refused() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 12]);
    let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
    pipe.push_with(&Down::Rows(rows(1)), |_| {});
    refused(
        &answer(&mut pipe).await,
        0,
        Fault::Caller,
        FailureCode::BadFrame,
    );
    let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
    pipe.push(&Down::Open(open(&swarm)));
    opened(&mut pipe).await;
    let mut twin = raw(&swarm, CLIENT, 0, Proto::Session).await;
    twin.push(&Down::Open(open(&swarm)));
    let text = refused(
        &answer(&mut twin).await,
        0,
        Fault::Caller,
        FailureCode::WrongSession,
    );
    assert!(text.contains("this session is at 0"), "{text}");
    pipe.push(&Down::Open(open(&swarm)));
    refused(
        &answer(&mut pipe).await,
        0,
        Fault::Caller,
        FailureCode::WrongSession,
    );
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_stream_without_its_session_and_a_session_without_its_stream_end() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 12]);
    // A stranger attaches to a session that is not its own: both sides wait in vain.
    let mut session = raw(&swarm, CLIENT, 0, Proto::Session).await;
    session.push(&Down::Open(open(&swarm)));
    opened(&mut session).await;
    let mut stranger = raw(&swarm, peer(66), 0, Proto::Answer).await;
    stranger.push(&Attach {
        session: SESSION,
        epoch: Epoch(0),
    });
    stranger.flush().await.unwrap();
    assert!(stranger.frame::<Answer>().await.unwrap().is_none());
    let text = refused(
        &answer(&mut session).await,
        0,
        Fault::Caller,
        FailureCode::Deadline,
    );
    assert!(text.contains("attach"), "{text}");
    swarm.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_opener_is_not_waited_for() {
    let _clock = Clock::start();
    let swarm = Swarm::new(&[0, 12]);
    let mut pipe = raw(&swarm, CLIENT, 0, Proto::Session).await;
    assert!(pipe.frame::<Up>().await.unwrap().is_none());
    let mut pipe = raw(&swarm, CLIENT, 0, Proto::Answer).await;
    assert!(pipe.frame::<Answer>().await.unwrap().is_none());
}

/// A tail made by hand: what it answers is what the client must refuse.
async fn bad_tail(reply: impl FnOnce(&mut Pipe, Epoch)) -> ClientError {
    let swarm = Swarm::new(&[0, 12]);
    let (to, mut streams) = tokio::sync::mpsc::unbounded_channel();
    swarm.wires.set(peer(1), Behaviour::Test(to));
    let opener = swarm.opener();
    let route = swarm.route();
    let kind = Kind {
        model: MODEL,
        n_ctx: 100,
        dtype: Dtype::F32,
        n_embd: N_EMBD,
        numerics: swarm_proto::Numerics::Exact,
        n_vocab: N_VOCAB,
    };
    let tail = async {
        let (mut up, mut answers): (Option<Pipe>, Option<Pipe>) = (None, None);
        while up.is_none() || answers.is_none() {
            let (_, proto, stream): (_, _, Stream) = streams.recv().await.unwrap();
            let mut pipe = Pipe::new(stream, WIDE);
            if proto == Proto::Answer {
                pipe.frame::<Attach>().await.unwrap().unwrap();
                pipe.push(&Answer::Attached);
                pipe.flush().await.unwrap();
                answers = Some(pipe);
            } else {
                pipe.frame::<Down>().await.unwrap().unwrap();
                pipe.push(&Up::Opened {
                    n_embd: N_EMBD,
                    n_vocab: N_VOCAB,
                    held: 0,
                });
                pipe.flush().await.unwrap();
                up = Some(pipe);
            }
        }
        (up.unwrap(), answers.unwrap())
    };
    let (session, (mut up, mut answers)) =
        tokio::join!(opener.open_route(kind, route.clone()), tail);
    let mut session = session.unwrap();
    session.feed(&[1, 2], TOP1).await.unwrap();
    up.frame::<Down>().await.unwrap().unwrap();
    reply(&mut answers, Epoch(0));
    answers.flush().await.unwrap();
    session.next_logits().await.unwrap_err()
}

/// What the tail owes for the second of two tokens.
fn good_logits(epoch: Epoch) -> Logits {
    Logits {
        epoch,
        pos: 1,
        n_vocab: N_VOCAB,
        form: LogitsForm::Top { k: 1, lse: 2.0 },
        spent_us: 0,
    }
}

#[tokio::test(start_paused = true)]
async fn logits_that_cannot_be_right_are_the_tails_fault() {
    let _clock = Clock::start();
    let good = good_logits;
    let pair = |id: u32, logit: f32| {
        move |out: &mut Vec<u8>| {
            out.extend(id.to_le_bytes());
            out.extend(logit.to_le_bytes());
        }
    };
    let top = |k, lse| LogitsForm::Top { k, lse };
    let errors = [
        bad_tail(|p, e| p.push_with(&Answer::Logits(good(e)), pair(1, f32::NAN))).await,
        bad_tail(|p, e| p.push_with(&Answer::Logits(good(e)), pair(1, f32::INFINITY))).await,
        bad_tail(|p, e| p.push_with(&Answer::Logits(good(e)), pair(N_VOCAB, 1.0))).await,
        bad_tail(|p, e| p.push_with(&Answer::Logits(good(e)), |_| {})).await,
        bad_tail(|p, e| p.push_with(&Answer::Logits(Logits { pos: 0, ..good(e) }), pair(1, 1.0)))
            .await,
        bad_tail(|p, _| p.push_with(&Answer::Logits(good(Epoch(1))), pair(1, 1.0))).await,
        bad_tail(|p, e| {
            p.push_with(
                &Answer::Logits(Logits {
                    n_vocab: 5,
                    ..good(e)
                }),
                pair(1, 1.0),
            )
        })
        .await,
        bad_tail(|p, e| {
            p.push(&Answer::Logits(Logits {
                form: top(0, 1.0),
                ..good(e)
            }))
        })
        .await,
        bad_tail(|p, e| {
            p.push_with(
                &Answer::Logits(Logits {
                    form: top(1, 0.1),
                    ..good(e)
                }),
                pair(1, 1.0),
            );
        })
        .await,
        bad_tail(|p, _| p.push(&Answer::Attached)).await,
    ];
    errors.iter().for_each(blames_the_tail);
}

#[tokio::test(start_paused = true)]
async fn rows_of_another_form_than_was_asked_for_are_the_tails_fault() {
    let _clock = Clock::start();
    let good = good_logits;
    let errors = [
        bad_tail(|p, e| {
            p.push_with(
                &Answer::Logits(Logits {
                    form: LogitsForm::Full,
                    ..good(e)
                }),
                |out| {
                    out.extend(std::iter::repeat_n(0, 4 * N_VOCAB as usize));
                },
            );
        })
        .await,
        bad_tail(|p, e| {
            p.push_with(
                &Answer::Logits(Logits {
                    form: LogitsForm::Normed,
                    n_vocab: N_EMBD,
                    ..good(e)
                }),
                |out| {
                    out.extend(std::iter::repeat_n(0, 4 * N_EMBD as usize));
                },
            );
        })
        .await,
    ];
    errors.iter().for_each(blames_the_tail);
}

fn blames_the_tail(error: &ClientError) {
    let ClientError::Hop { hop, failure } = error else {
        panic!("{error:?}")
    };
    assert_eq!((hop.at, failure.fault), (0, Fault::Peer), "{error}");
    assert_eq!(failure.code, FailureCode::BadFrame, "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_peers_words_cannot_move_the_cursor() {
    let _clock = Clock::start();
    let error = bad_tail(|p, _| {
        p.push(&Answer::Failed(swarm_proto::Failure {
            at: 0,
            fault: Fault::Local,
            code: FailureCode::Engine,
            message: "no\x1b[2J".into(),
        }));
    })
    .await;
    assert!(!error.to_string().contains('\x1b'), "{error}");
}
