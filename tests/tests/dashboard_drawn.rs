//! The page in a real browser over swarms that never were: one of a thousand peers, and one of liars.
//!
//! Without Chromium it is left out, as tests/tests/dashboard.rs is.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::swarm::{
    FailedView, FinishedView, HolderView, HopView, LiveView, ModelView, NodeView, PeerDetail,
    PeerView, RequestView, Seeing, ShardView, Stage, SwarmView, WhyView,
};
use api::{ApiError, Config, Found, Keys, Listed, Models, Server};
use futures::FutureExt;
use futures::future::BoxFuture;
use node::answer::Source;
use node::control::{NodeStatus, State};
use tests::browser::{self, Browser};

/// What a peer might call anything.
const NASTY: &str =
    "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>";

/// A swarm as somebody drew it.
struct Drawn(SwarmView);

impl Seeing for Drawn {
    fn swarm(&self) -> SwarmView {
        self.0.clone()
    }

    fn peer<'a>(
        &'a self,
        peer: &'a str,
        _: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PeerDetail, ApiError>> {
        let detail = PeerDetail {
            peer: peer.into(),
            alive: true,
            agent: NASTY.into(),
            addrs: vec![NASTY.into()],
            seen: Some(FailedView {
                last: NASTY.into(),
                ..FailedView::default()
            }),
            why: Some(WhyView {
                text: NASTY.into(),
                ..WhyView::default()
            }),
            ..PeerDetail::default()
        };
        async { Ok(detail) }.boxed()
    }

    fn node(&self) -> BoxFuture<'_, Option<NodeStatus>> {
        async { None }.boxed()
    }
}

impl Models for Drawn {
    fn listed(&self) -> Vec<Listed> {
        Vec::new()
    }

    fn peers(&self) -> usize {
        0
    }

    fn find<'a>(&'a self, _: Option<&'a str>) -> BoxFuture<'a, Result<Arc<Found>, ApiError>> {
        async { Err(ApiError::unknown_model(NASTY)) }.boxed()
    }

    fn open<'a>(&'a self, _: &'a Found, _: u32) -> BoxFuture<'a, Result<Source, ApiError>> {
        async { Err(ApiError::unavailable("nobody is there")) }.boxed()
    }

    fn privacy(&self) -> &'static str {
        "open"
    }

    fn wire(&self) -> String {
        "f32".into()
    }
}

/// A page over a drawn swarm; none where there is no browser.
async fn page(view: SwarmView) -> Result<Option<Browser>> {
    let Some(program) = browser::program() else {
        return Ok(None);
    };
    let config = Config {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        without_key: false,
        keys: Keys::default(),
        cors: Vec::new(),
        tls: None,
        body_bytes_max: 1 << 16,
        requests_max: 2,
        max_tokens: 16,
        drain: Duration::ZERO,
    };
    let server = Server::bind(config, Arc::new(Drawn(view))).await?;
    let url = server.url();
    tokio::spawn(server.run(std::future::pending()));
    let mut page = Browser::start(&program, 1280, 800).await?;
    page.open(&url).await?;
    page.until("document.querySelector('#link')?.dataset.state === 'live'")
        .await?;
    Ok(Some(page))
}

fn peer(name: &str) -> PeerView {
    PeerView {
        peer: name.into(),
        heard_s_ago: 1.0,
        connected: true,
        ..PeerView::default()
    }
}

fn holder(name: &str, layers: [u16; 2]) -> HolderView {
    HolderView {
        peer: name.into(),
        live: vec![layers],
        intended: vec![layers],
        layer_tokens_s: Some(100.0),
        ..HolderView::default()
    }
}

/// Requests and a node of which everything is named so.
fn liars_requests(hop: HopView) -> LiveView {
    LiveView {
        requests: vec![RequestView {
            model: NASTY.into(),
            stage: Stage::Waits,
            lost: Some(NASTY.into()),
            route: vec![hop.clone()],
            standbys: vec![hop.clone()],
            ..RequestView::default()
        }],
        finished: vec![FinishedView {
            model: NASTY.into(),
            why: Some(NASTY.into()),
            route: vec![hop],
            ..FinishedView::default()
        }],
        node: Some(NodeView {
            peer: NASTY.into(),
            state: State::Serving,
            uptime_s: 1,
            sessions: 0,
            kv_bytes: 0,
            kv_bytes_max: 1,
            tensor_bytes: 0,
            fetched_bytes: 0,
            given_bytes: 0,
            upload_bytes_s_max: None,
            disk_bytes: None,
            disk_bytes_max: None,
            shards_done: 0,
            coming: vec![ShardView {
                kind: NASTY.into(),
                model: NASTY.into(),
                bytes: 2,
                fetched_bytes: 1,
            }],
        }),
        ..LiveView::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_peers_become_text_and_no_markup() -> Result<()> {
    let name = |n: usize| format!("{n}{NASTY}");
    let hop = HopView {
        peer: name(0),
        layers: [0, 4],
    };
    // `live` is the server's own: what a hostile one would say is said by the map, the chat and the panel.
    let view = SwarmView {
        swarm: NASTY.into(),
        peers: (0..3).map(|n| peer(&name(n))).collect(),
        models: vec![ModelView {
            id: NASTY.into(),
            name: NASTY.into(),
            n_layer: 4,
            complete: true,
            copies: vec![3; 4],
            holders: (0..3).map(|n| holder(&name(n), [0, 4])).collect(),
            ..ModelView::default()
        }],
        failed: vec![FailedView {
            peer: name(0),
            last: NASTY.into(),
            ..FailedView::default()
        }],
        ..SwarmView::default()
    };
    let Some(mut page) = page(view).await? else {
        return Ok(());
    };
    page.until("document.querySelectorAll('#map .rows li').length === 3")
        .await?;
    page.evaluate("document.querySelector('#map .row').click()")
        .await?;
    page.until("document.querySelector('#panel .addrs')")
        .await?;
    page.evaluate("document.querySelector('#chat-text').focus()")
        .await?;
    page.write(NASTY).await?;
    page.press("Enter").await?;
    page.until("document.querySelector('.bubble.assistant .about')?.textContent.includes('<img')")
        .await?;
    // Lists that only a server fills, drawn by the page's own parts from the same words.
    let live = liars_requests(hop);
    let said = serde_json::to_string(&live)?;
    let draw = format!(
        "Promise.all([import('/ui/lists.js'), import('/ui/tiles.js')]).then(([lists, tiles]) => {{ \
           const view = {said}; lists.requests(view, () => {{}}); tiles.node(view); \
           return document.querySelectorAll('#requests > li').length; }})"
    );
    ensure!(page.evaluate(&draw).await? == 1);
    let markup = "document.querySelectorAll('img:not([src=\"/ui/icon.svg\"]), script:not([src^=\"/ui/\"])').length";
    ensure!(page.evaluate(markup).await? == 0);
    let title = page.evaluate("document.title").await?;
    ensure!(
        title
            .as_str()
            .is_some_and(|title| title.starts_with("Shoal")),
        "{title}"
    );
    // The browser refuses such a string even if a line of the page made markup of it.
    let refused = "try { document.body.insertAdjacentHTML('beforeend', '<b>x</b>'); 'taken' } catch (error) { error.name }";
    ensure!(page.evaluate(refused).await? == "TypeError");
    page.close().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_peers_on_eighty_layers_are_some_dozen_rows() -> Result<()> {
    let name = |n: u16| format!("12D3KooWpeer{n:06}");
    let span = |n: u16| [n % 10 * 8, n % 10 * 8 + 8];
    let view = SwarmView {
        swarm: "large".into(),
        peers: (0..1000).map(|n| peer(&name(n))).collect(),
        models: vec![ModelView {
            id: "ab".repeat(32),
            name: "large".into(),
            n_layer: 80,
            complete: true,
            copies: vec![100; 80],
            holders: (0..1000).map(|n| holder(&name(n), span(n))).collect(),
            ..ModelView::default()
        }],
        ..SwarmView::default()
    };
    let Some(mut page) = page(view).await? else {
        return Ok(());
    };
    page.until("document.querySelectorAll('#map .rows li').length === 10")
        .await?;
    let first = page.text("#map .rows li").await?;
    ensure!(first.contains("100 peers"), "{first}");
    let elements = page
        .evaluate("document.querySelectorAll('*').length")
        .await?;
    ensure!(elements.as_u64().context("a number")? < 1000, "{elements}");
    // A group opens, and one of a thousand is found.
    page.evaluate("document.querySelector('#map .row').click()")
        .await?;
    page.until("document.querySelectorAll('#map .rows li').length === 110")
        .await?;
    page.evaluate("document.querySelector('#find').focus()")
        .await?;
    page.write("000777").await?;
    page.until("document.querySelectorAll('#map .rows li').length === 1")
        .await?;
    let wide = "document.documentElement.scrollWidth <= innerWidth";
    for (width, height) in [(1280, 800), (820, 1180), (390, 844), (320, 640)] {
        page.resize(width, height).await?;
        page.until(wide).await?;
    }
    ensure!(page.errors().is_empty(), "{:?}", page.errors());
    page.close().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_swarm_says_what_to_do() -> Result<()> {
    let Some(mut page) = page(SwarmView::default()).await? else {
        return Ok(());
    };
    page.until("document.querySelector('#map .empty')?.textContent.includes('No peers yet')")
        .await?;
    ensure!(page.text("#tiles").await?.contains("no model"));
    ensure!(
        page.evaluate("document.querySelector('#chat-send').disabled")
            .await?
            == true
    );
    page.evaluate("document.querySelector('#theme').click()")
        .await?;
    page.until("document.documentElement.dataset.theme === 'dark'")
        .await?;
    page.evaluate("document.querySelector('#theme').click()")
        .await?;
    page.until("document.documentElement.dataset.theme === 'light'")
        .await?;
    // All that can be operated has a name.
    let nameless = "[...document.querySelectorAll('button, input, select, textarea')].filter((it) => !(it.innerText || it.getAttribute('aria-label') || it.labels?.length)).map((it) => it.outerHTML)";
    let nameless = page.evaluate(nameless).await?;
    ensure!(nameless == serde_json::json!([]), "{nameless}");
    page.close().await
}
