//! A word to the service manager that started this process, where it wants to hear (`NOTIFY_SOCKET`, as systemd's
//! `Type=notify` sets it): that it serves now, that it is stopping. Elsewhere nothing happens.

/// Requests and sessions are served from now on.
pub fn ready() {
    say("READY=1");
}

/// Nothing new is taken any more.
pub fn stopping() {
    say("STOPPING=1");
}

#[cfg(target_os = "linux")]
fn say(word: &str) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&socket, word)
    {
        tracing::warn!(%error, ?socket, "the service manager does not listen");
    }
}

#[cfg(not(target_os = "linux"))]
fn say(_: &str) {}

/// One datagram, to a path or, beginning with `@`, to a name that is no file.
#[cfg(target_os = "linux")]
fn send(socket: &std::ffi::OsStr, word: &str) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let addr = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let from = UnixDatagram::unbound()?;
    from.set_nonblocking(true)?;
    from.send_to_addr(word.as_bytes(), &addr).map(drop)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    #[test]
    fn the_word_arrives_at_a_path_and_at_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("shoal-test-{}", std::process::id());
        let at_path = UnixDatagram::bind(&path).unwrap();
        let addr = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        let at_name = UnixDatagram::bind_addr(&addr).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        send(format!("@{name}").as_ref(), "STOPPING=1").unwrap();
        for (socket, wanted) in [(at_path, "READY=1"), (at_name, "STOPPING=1")] {
            let mut heard = [0; 32];
            let n = socket.recv(&mut heard).unwrap();
            assert_eq!(&heard[..n], wanted.as_bytes());
        }
        assert!(send(folder.path().join("nobody").as_os_str(), "READY=1").is_err());
    }
}
