//! What works: routes of many shapes, prefill, decode, truncation, several sessions.

use swarm_proto::{Dtype, Form, Want, WantRows};

use super::swarm::*;
use crate::session::ClientError;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_hops_and_any_spans_give_the_whole_models_tokens() {
    for cuts in [
        vec![0, 12],
        vec![0, 1, 12],
        vec![0, 5, 7, 12],
        vec![0, 3, 4, 11, 12],
        vec![0, 2, 4, 6, 8, 12],
        vec![0, 1, 2, 3, 7, 10, 12],
    ] {
        let swarm = Swarm::new(&cuts);
        for n in [1, 2, 31, 32, 33, 100, 500] {
            let mut session = swarm.open().await;
            decode(&mut session, &mut Vec::new(), &prompt(n, 1), 5).await;
            session.close().await;
        }
        swarm.assert_empty().await;
    }
}

#[tokio::test]
async fn every_dtype_carries_the_chain() {
    let swarm = Swarm::new(&[0, 4, 9, 12]);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
        let mut session = swarm.open_as(CLIENT, 256, dtype).await;
        decode(&mut session, &mut Vec::new(), &prompt(40, 2), 8).await;
    }
    swarm.assert_empty().await;
}

#[tokio::test]
async fn truncation_takes_rows_back() {
    let swarm = Swarm::new(&[0, 4, 9, 12]);
    let mut session = swarm.open().await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(70, 3), 6).await;
    for keep in [50, 49, 1, 0] {
        session.truncate(keep).unwrap();
        all.truncate(keep as usize);
        decode(&mut session, &mut all, &prompt(20, keep), 3).await;
    }
    let beyond = session.pos() + 1;
    assert!(matches!(
        session.truncate(beyond),
        Err(ClientError::Truncate { .. })
    ));
    session.close().await;
    swarm.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clients_at_once_are_both_right() {
    let swarm = std::sync::Arc::new(Swarm::new(&[0, 4, 9, 12]));
    let mut tasks = Vec::new();
    for n in 0..6u8 {
        let swarm = swarm.clone();
        tasks.push(tokio::spawn(async move {
            let mut session = swarm.open_as(peer(100 + n / 2), 512, Dtype::F32).await;
            let mut all = Vec::new();
            for turn in 0..4 {
                let tokens = prompt(10 + 13 * u32::from(n), u32::from(n) + turn);
                decode(&mut session, &mut all, &tokens, 7).await;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    swarm.assert_empty().await;
}

#[tokio::test]
async fn all_rows_come_in_order_and_full_rows_agree_with_top() {
    let swarm = Swarm::new(&[0, 6, 12]);
    let tokens = prompt(100, 5);
    let mut top = swarm.open().await;
    let mut full = swarm.open().await;
    top.feed(
        &tokens,
        Want {
            rows: WantRows::All,
            form: Form::Top(10),
        },
    )
    .await
    .unwrap();
    full.feed(
        &tokens,
        Want {
            rows: WantRows::All,
            form: Form::Full,
        },
    )
    .await
    .unwrap();
    for pos in 0..100 {
        let (a, b) = (
            top.next_logits().await.unwrap(),
            full.next_logits().await.unwrap(),
        );
        assert_eq!((a.pos, b.pos), (pos, pos));
        assert_eq!((a.top.len(), b.full.len()), (10, N_VOCAB as usize));
        assert_eq!(a.argmax(), b.argmax());
        assert_eq!(
            a.argmax().unwrap(),
            reference().expected(&tokens[..=pos as usize])
        );
        let token = a.argmax().unwrap();
        assert!((a.log_prob(token).unwrap() - b.log_prob(token).unwrap()).abs() < 1e-5);
        full.recycle(b);
    }
    assert_eq!(top.next_logits().await, Err(ClientError::NothingAsked));
    drop((top, full));
    swarm.assert_empty().await;
}

#[tokio::test]
async fn rows_behind_the_last_norm_are_the_same_along_any_route() {
    let tokens = prompt(70, 8);
    let mut all = Vec::new();
    for cuts in [&[0, 12][..], &[0, 5, 12], &[0, 4, 9, 12]] {
        let swarm = Swarm::new(cuts);
        let mut session = swarm.open().await;
        let form = Form::Normed;
        let rows = WantRows::All;
        session.feed(&tokens, Want { rows, form }).await.unwrap();
        let mut rows = Vec::new();
        for pos in 0..70 {
            let row = session.next_logits().await.unwrap();
            assert_eq!((row.pos, row.normed.len()), (pos, N_EMBD as usize));
            assert!(row.top.is_empty() && row.full.is_empty());
            rows.push(row.normed);
        }
        // The last alone is the last of all, and logits may follow in the same session.
        session.truncate(0).unwrap();
        let last = WantRows::Last;
        let want = Want { rows: last, form };
        session.feed(&tokens, want).await.unwrap();
        let row = session.next_logits().await.unwrap();
        assert_eq!((row.pos, Some(&row.normed)), (69, rows.last()));
        session.feed(&[5], TOP1).await.unwrap();
        let mut fed = tokens.clone();
        fed.push(5);
        let next = session.next_logits().await.unwrap().argmax();
        assert_eq!(next, Some(reference().expected(&fed)));
        all.push(rows);
    }
    assert!(all.iter().all(|rows| *rows == all[0]));
    assert_ne!(all[0][0], all[0][1]);
}

#[tokio::test]
async fn the_full_context_is_said_and_nothing_is_lost() {
    let swarm = Swarm::new(&[0, 6, 12]);
    let mut session = swarm.open_as(CLIENT, 40, Dtype::F32).await;
    let mut all = Vec::new();
    decode(&mut session, &mut all, &prompt(37, 6), 2).await;
    let full = session.feed(&[1, 2], TOP1).await;
    assert_eq!(
        full,
        Err(ClientError::ContextFull {
            n_ctx: 40,
            pos: 39,
            asked: 2
        })
    );
    decode(&mut session, &mut all, &[5], 0).await;
    assert!(session.feed(&[1], TOP1).await.is_err());
    session.truncate(3).unwrap();
    all.truncate(3);
    decode(&mut session, &mut all, &prompt(10, 7), 2).await;
    let bad = session.feed(&[N_VOCAB], TOP1).await;
    assert_eq!(
        bad,
        Err(ClientError::Token {
            token: N_VOCAB,
            n_vocab: N_VOCAB
        })
    );
}

#[tokio::test]
async fn the_time_spent_computing_adds_up_over_the_hops() {
    let pace = std::time::Duration::from_micros(200);
    let swarm = Swarm::with(&[0, 3, 7, 12], Default::default(), |stage| {
        stage.with_pace(pace)
    });
    let mut session = swarm.open().await;
    session.feed(&[1], TOP1).await.unwrap();
    let row = session.next_logits().await.unwrap();
    assert!(
        row.spent_us >= 12 * 200,
        "{} µs over three hops",
        row.spent_us
    );
}

/// Hops before the last two are done, and have nothing to say of themselves, for longer than any hop may be silent.
#[tokio::test]
async fn a_client_hears_of_work_however_far_down_the_route_it_is() {
    let pace = std::time::Duration::from_millis(6);
    let swarm = Swarm::with(&[0, 1, 2, 11, 12], Default::default(), |stage| {
        stage.with_pace(pace)
    });
    let mut session = swarm.open().await;
    let silence = swarm.limits.deadlines.silence;
    assert!(pace * 32 * 9 > silence * 2, "the third hop takes long");
    decode(&mut session, &mut Vec::new(), &prompt(32, 5), 0).await;
    session.close().await;
    swarm.assert_empty().await;
}
