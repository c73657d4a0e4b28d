//! Models over real TLS: a hub and an address behind certificates of an authority of our own, which is trusted where
//! `SSL_CERT_FILE` names it, and by nobody else.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on says where

#[path = "../../download/tests/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use support::World;

/// Who signs certificates.
struct Authority {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Authority { certificate, key }
    }

    /// Its certificate as programs are given it.
    fn write(&self, path: &Path) -> PathBuf {
        let text = data_encoding::BASE64.encode(self.certificate.der());
        let lines = text.as_bytes().chunks(64).map(String::from_utf8_lossy);
        let body: Vec<_> = lines.collect();
        let (begin, end) = ("-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----");
        std::fs::write(path, format!("{begin}\n{}\n{end}\n", body.join("\n"))).unwrap();
        path.to_owned()
    }

    /// A server of `name`, with TLS in front of one without.
    fn front(&self, name: &str, behind: &str) -> String {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let leaf = params
            .signed_by(&key, &self.certificate, &self.key)
            .unwrap();
        let secret = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain: Vec<CertificateDer<'static>> = vec![leaf.der().clone()];
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, secret)
            .unwrap();
        let (config, behind) = (Arc::new(config), behind.replace("http://", ""));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!(
            "https://127.0.0.1:{}",
            listener.local_addr().unwrap().port()
        );
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, behind) = (config.clone(), behind.clone());
                // A client that leaves, or refuses the certificate, is the test's own doing.
                std::thread::spawn(move || pass(stream, config, &behind).unwrap_or_default());
            }
        });
        address
    }
}

/// One request, and its answer.
fn pass(stream: TcpStream, config: Arc<ServerConfig>, behind: &str) -> std::io::Result<()> {
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut tls = StreamOwned::new(connection, stream);
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        tls.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let mut server = TcpStream::connect(behind)?;
    server.write_all(&request)?;
    std::io::copy(&mut server, &mut tls)?;
    tls.conn.send_close_notify();
    tls.flush()
}

/// The demo model at a hub and its store, both with TLS only.
struct Office {
    world: World,
    hub: String,
    store: String,
    trusted: PathBuf,
}

fn office(name: &str) -> Office {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo.gguf");
    let world = World::new(&[("tiny-F16.gguf", std::fs::read(demo).unwrap())]);
    let authority = Authority::new();
    let store = authority.front(name, &world.store.address);
    let hub = authority.front(name, &world.hub.address);
    world.hub.plan().store = store.clone();
    let trusted = authority.write(&world.dir.path().join("office.pem"));
    Office {
        world,
        hub,
        store,
        trusted,
    }
}

impl Office {
    fn import(&self, source: &str, trusted: &Path) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        for (name, _) in std::env::vars() {
            if name.starts_with("SHOAL_") || name.starts_with("HF_") || name.contains("PROXY") {
                command.env_remove(name);
            }
        }
        let home = self.world.dir.path();
        command
            .args(["import", source, "--json"])
            .env("SHOAL_HOME", home)
            .env("HOME", home)
            .env("XDG_CONFIG_HOME", home.join("config"))
            .env("XDG_CACHE_HOME", home.join("cache"))
            .env("HF_ENDPOINT", &self.hub)
            .env("SSL_CERT_FILE", trusted)
            .env_remove("SSL_CERT_DIR")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn refusal(&self, source: &str, trusted: &Path) -> String {
        let output = self.import(source, trusted);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

#[test]
fn an_offices_own_authority_is_trusted_where_it_is_named() {
    let office = office("127.0.0.1");
    let plain = format!("{}/store/tiny-F16.gguf", office.store);
    for source in ["hf:owner/repo/tiny-F16.gguf", &plain] {
        let output = office.import(source, &office.trusted);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{source}: {said}");
    }
    assert_eq!(office.world.fetched().len(), 2);
}

#[test]
fn a_server_that_cannot_prove_who_it_is_gets_nothing_and_the_remedy_is_named() {
    let honest = office("127.0.0.1");
    let source = "hf:owner/repo/tiny-F16.gguf";
    let other = Authority::new().write(&honest.world.dir.path().join("other.pem"));
    let said = honest.refusal(source, &other);
    assert!(said.contains("cannot prove who it is"), "{said}");
    assert!(said.contains("SSL_CERT_FILE"), "{said}");
    let nothing = honest.refusal(source, Path::new("/nowhere.pem"));
    assert!(
        nothing.contains("no certificates of authorities"),
        "{nothing}"
    );
    assert!(nothing.contains("SSL_CERT_FILE"), "{nothing}");
    // Of the right authority, and of another host.
    let elsewhere = office("elsewhere.example");
    let said = elsewhere.refusal(source, &elsewhere.trusted);
    assert!(said.contains("cannot prove who it is"), "{said}");
    for office in [honest, elsewhere] {
        let asked = office.world.hub.asked().len() + office.world.store.asked().len();
        assert_eq!(asked, 0, "nothing reached it");
    }
}
