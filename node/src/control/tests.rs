//! The socket by itself: who may open it, what is refused, what is left behind.

use std::{
    io::{Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixStream as Blocking},
};

use super::*;
use crate::pause::Why;

fn here(home: &Path) -> Control {
    Control::open(home, Peer([7; 32]), QuietHours::default())
}

async fn asked(home: &Path, request: Request) -> Result<NodeStatus, AskError> {
    let home = home.to_owned();
    tokio::task::spawn_blocking(move || ask(&home, &request))
        .await
        .unwrap()
}

/// What comes back for these bytes.
async fn said(home: &Path, bytes: Vec<u8>) -> String {
    let path = home.join(SOCKET);
    let say = move || {
        let mut stream = Blocking::connect(path).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut answer = String::new();
        // The node closes when it has answered.
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    tokio::task::spawn_blocking(say).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_socket_is_its_owners_alone_replaces_a_dead_ones_and_goes_with_its_node() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(SOCKET);
    // What a killed node leaves.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let refused = asked(home.path(), Request::Status).await.unwrap_err();
    assert!(matches!(refused, AskError::NoNode { .. }), "{refused}");
    assert!(
        refused
            .to_string()
            .contains(&home.path().display().to_string()),
        "{refused}"
    );

    let node = here(home.path());
    let meta = fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let status = asked(home.path(), Request::Status).await.unwrap();
    assert_eq!(status.state, State::Starting);
    assert_eq!(status.peer, Peer([7; 32]).to_string());
    let left: Vec<_> = fs::read_dir(home.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");

    drop(node);
    assert!(!path.exists());
    let refused = asked(home.path(), Request::Status).await.unwrap_err();
    assert!(matches!(refused, AskError::NoNode { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_and_endless_requests_are_refused_and_the_next_is_answered() {
    let home = tempfile::tempdir().unwrap();
    let _node = here(home.path());
    for nonsense in [
        "\n",
        "{}\n",
        "{\"do\":\"fly\"}\n",
        "{\"do\":\"pause\",\"for_s\":-1}\n",
        "[[[[",
    ] {
        let mut bytes = nonsense.as_bytes().to_vec();
        bytes.resize(bytes.len().max(REQUEST_BYTES_MAX as usize), b' ');
        let answer = said(home.path(), bytes).await;
        assert!(answer.contains("refused"), "{nonsense:?}: {answer}");
    }
    // Those who connect and say nothing hold a place each, until their time is over.
    let path = home.path().join(SOCKET);
    let idle = || Blocking::connect(&path).unwrap();
    let _idle: Vec<_> = (0..CONNECTIONS_MAX - 1).map(|_| idle()).collect();
    assert!(asked(home.path(), Request::Status).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_is_told_kept_and_taken_back() {
    let home = tempfile::tempdir().unwrap();
    let node = here(home.path());
    let status = asked(home.path(), Request::Pause { for_s: None })
        .await
        .unwrap();
    let paused = status.paused.unwrap();
    assert_eq!(
        (status.state, paused.why, paused.until),
        (State::Paused, Why::Owner, None)
    );
    drop(node);
    let node = here(home.path());
    let status = asked(home.path(), Request::Status).await.unwrap();
    assert_eq!(status.state, State::Paused, "it was started again");
    let status = asked(home.path(), Request::Resume).await.unwrap();
    assert_eq!((status.state, status.paused), (State::Starting, None));

    let soon = Request::Pause { for_s: Some(1) };
    assert!(asked(home.path(), soon).await.unwrap().paused.is_some());
    timeout(Duration::from_secs(20), node.pause().over())
        .await
        .unwrap();
    assert_eq!(
        asked(home.path(), Request::Status).await.unwrap().paused,
        None
    );
}
