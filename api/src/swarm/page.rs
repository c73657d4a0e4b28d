//! The page at `/`: files that are part of this program. They ask for nothing from elsewhere, hold nothing that is
//! secret, and so need no key; what they show comes from `/swarm` and `/v1`, which do.

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderName, HeaderValue,
    IF_NONE_MATCH, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::state::State as Shared;

/// Where the parts of the page are.
const PARTS: &str = "/ui/";

/// Only what this server gives, no script or style inside a page, and no text that becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
    tag: String,
}

macro_rules! files {
    ($($path:literal $kind:literal $file:literal)*) => {
        [$(File {
            path: $path,
            kind: $kind,
            text: include_str!(concat!("../../assets/", $file)),
            tag: format!("\"{}\"", blake3::hash(include_bytes!(concat!("../../assets/", $file))).to_hex()),
        }),*]
    };
}

static FILES: LazyLock<[File; 12]> = LazyLock::new(|| {
    files! {
        "/" "text/html; charset=utf-8" "index.html"
        "/ui/style.css" "text/css; charset=utf-8" "style.css"
        "/ui/icon.svg" "image/svg+xml" "icon.svg"
        "/ui/theme.js" "text/javascript; charset=utf-8" "theme.js"
        "/ui/main.js" "text/javascript; charset=utf-8" "main.js"
        "/ui/source.js" "text/javascript; charset=utf-8" "source.js"
        "/ui/map.js" "text/javascript; charset=utf-8" "map.js"
        "/ui/tiles.js" "text/javascript; charset=utf-8" "tiles.js"
        "/ui/lists.js" "text/javascript; charset=utf-8" "lists.js"
        "/ui/panel.js" "text/javascript; charset=utf-8" "panel.js"
        "/ui/chat.js" "text/javascript; charset=utf-8" "chat.js"
        "/ui/dom.js" "text/javascript; charset=utf-8" "dom.js"
    }
});

/// Whether a path is one of the page's own files, which need no key.
pub fn is_open(path: &str) -> bool {
    path == "/" || path.starts_with(PARTS)
}

/// The page's files.
pub(super) fn routes() -> Router<Arc<Shared>> {
    let mut router = Router::new();
    for file in FILES.iter() {
        router = router.route(file.path, get(file_of));
    }
    router
}

async fn file_of(request: Request) -> Response {
    let path = request.uri().path();
    match FILES.iter().find(|file| file.path == path) {
        Some(file) => file.answer(request.headers()),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

impl File {
    fn answer(&self, asked: &HeaderMap) -> Response {
        let known = asked.get(IF_NONE_MATCH).and_then(|tag| tag.to_str().ok());
        let known = known.is_some_and(|tags| {
            let mut tags = tags.split(',').map(str::trim);
            tags.any(|tag| tag == "*" || tag.trim_start_matches("W/") == self.tag)
        });
        let mut response = match known {
            true => StatusCode::NOT_MODIFIED.into_response(),
            false => self.text.into_response(),
        };
        let headers = response.headers_mut();
        let mut say = |name: HeaderName, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        };
        say(CONTENT_TYPE, self.kind);
        say(ETAG, &self.tag);
        // Asked for again each time, and sent only if this is another version of the program.
        say(CACHE_CONTROL, "no-cache");
        say(CONTENT_SECURITY_POLICY, POLICY);
        say(X_CONTENT_TYPE_OPTIONS, "nosniff");
        say(X_FRAME_OPTIONS, "DENY");
        say(REFERRER_POLICY, "no-referrer");
        say(
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        );
        say(
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        );
        response
    }
}
