//! Who may ask: keys, and where there are none, only programs of this machine, no web pages.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::Method;
use axum::http::header::HOST;
use axum::middleware::Next;
use axum::response::Response;
use node::keys::{Keys, is_own_name, key_of};

use crate::error::ApiError;
use crate::swarm::is_open;

/// Who may ask.
#[derive(Clone)]
pub struct Guard {
    /// Where there are any, every request needs one, but for `/health` and the files of the page.
    pub keys: Keys,
    /// Only requests to this machine's own address are answered: a web page that had its name resolved to it asks
    /// by that name.
    pub own_names_only: bool,
}

impl Guard {
    fn check(&self, request: &Request) -> Result<(), ApiError> {
        if self.own_names_only {
            let host = request.headers().get(HOST);
            let host = host.and_then(|host| host.to_str().ok()).unwrap_or("");
            if !is_own_name(host) {
                return Err(ApiError::foreign_host(host));
            }
        }
        let open = self.keys.is_empty()
            || request.uri().path() == "/health"
            || is_open(request.uri().path())
            || request.method() == Method::OPTIONS;
        if open || key_of(request.headers()).is_some_and(|key| self.keys.has(key)) {
            return Ok(());
        }
        Err(ApiError::unauthorized())
    }
}

/// Lets a request pass or answers it.
///
/// # Errors
/// It may not be asked.
pub async fn guard(
    State(guard): State<Arc<Guard>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    guard.check(&request)?;
    Ok(next.run(request).await)
}

/// Whose request it is: the hash of its key, where it has one.
pub fn caller(request: &Request) -> Option<[u8; 32]> {
    let key = key_of(request.headers())?;
    Some(*blake3::hash(key.trim().as_bytes()).as_bytes())
}
#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn asked(guard: &Guard, path: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        guard
            .check(&request)
            .map_or_else(|e| e.status().as_u16(), |()| 200)
    }

    #[test]
    fn a_key_opens_and_nothing_else_does() {
        let mut keys = Keys::of_file("# ours\nfirst\n\n  second  \n");
        keys.add(Keys::new(["third", ""]));
        let guard = Guard {
            keys,
            own_names_only: false,
        };
        let ask = |headers: &[(&str, &str)]| asked(&guard, "/v1/models", headers);
        for key in ["first", "second", "third"] {
            assert_eq!(ask(&[("authorization", &format!("Bearer {key}"))]), 200);
            assert_eq!(ask(&[("x-api-key", key)]), 200);
        }
        for wrong in ["", "firs", "first2", "# ours"] {
            assert_eq!(ask(&[("authorization", &format!("Bearer {wrong}"))]), 401);
            assert_eq!(ask(&[("x-api-key", wrong)]), 401);
        }
        assert_eq!(ask(&[("authorization", "Basic first")]), 401);
        assert_eq!(ask(&[]), 401);
        for open in ["/health", "/", "/ui/main.js"] {
            assert_eq!(asked(&guard, open, &[]), 200, "{open}");
        }
        for closed in ["/swarm", "/swarm/events", "/swarm/peers/x", "/uix", "//"] {
            assert_eq!(asked(&guard, closed, &[]), 401, "{closed}");
        }
    }

    #[test]
    fn a_web_page_does_not_reach_a_server_without_keys() {
        let guard = Guard {
            keys: Keys::default(),
            own_names_only: true,
        };
        for own in [
            "localhost:8080",
            "127.0.0.1",
            "127.9.9.9:1",
            "[::1]:80",
            "LOCALHOST",
        ] {
            assert_eq!(asked(&guard, "/v1/models", &[("host", own)]), 200, "{own}");
        }
        for foreign in [
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "",
        ] {
            assert_eq!(
                asked(&guard, "/v1/models", &[("host", foreign)]),
                403,
                "{foreign}"
            );
        }
        assert_eq!(asked(&guard, "/v1/models", &[]), 403);
    }
}
