//! Whose certificates are trusted: those of the system, or of the file that `SSL_CERT_FILE` names.

use std::sync::Arc;

use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// How https is spoken to servers elsewhere.
pub struct SystemTls {
    /// For an agent of `ureq`.
    pub config: TlsConfig,
    /// Why no certificate can be checked, where that is so.
    pub no_roots: Option<String>,
}

/// Reads the system's certificates.
pub fn system_tls() -> SystemTls {
    let found = rustls_native_certs::load_native_certs();
    let no_roots = found.certs.is_empty().then(|| {
        let errors = found.errors.iter().map(ToString::to_string);
        errors
            .reduce(|a, b| format!("{a}; {b}"))
            .unwrap_or_else(|| "none was found".into())
    });
    let roots: Vec<Certificate<'static>> = found
        .certs
        .iter()
        .map(|der| Certificate::from_der(der.as_ref()).to_owned())
        .collect();
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .unversioned_rustls_crypto_provider(Arc::new(provider))
        .build();
    SystemTls { config, no_roots }
}
