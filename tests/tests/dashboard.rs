//! The page of `shoal serve` in a real browser, over a real swarm: it shows who holds which layers, the route of a
//! request, a lost hop, one peer; it chats; it asks for a key; and it asks nobody but its server for anything.
//!
//! Where there is no Chromium (`apt install chromium`) the test says so on standard error and passes; with SHOAL_BROWSER
//! set it fails. With SHOAL_PICTURES set to a folder it also writes the pictures of docs/images there.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use testnet::swarm::{Node, Swarm};
use tests::browser::{self, Browser};
use tests::http::{Api, asking, keep_asking};
use tests::{FOUR_SPANS, PATIENCE, join, repository, serve, until};

const KEY: &str = "a-key-for-tests";
const QUESTION: &str = "Tell me a story about a fox.";

/// The browser's program; nothing where there is none.
fn chromium() -> Result<Option<PathBuf>> {
    let program = browser::program();
    let asked = std::env::var_os("SHOAL_BROWSER").is_some();
    ensure!(
        program.is_some() || !asked,
        "SHOAL_BROWSER is set and there is no Chromium: `apt install chromium`, or name it in SHOAL_CHROMIUM"
    );
    if program.is_none() {
        // The test harness swallows what the macros print, and this must be seen.
        writeln!(
            std::io::stderr(),
            "\nNOT TESTED: there is no Chromium here; set SHOAL_BROWSER to make this a failure\n"
        )?;
    }
    Ok(program)
}

/// Where the pictures go, if they are wanted.
fn pictures() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("SHOAL_PICTURES")?);
    Some(if folder.is_absolute() {
        folder
    } else {
        repository().join(folder)
    })
}

async fn ready(api: &Api) -> Result<()> {
    let health = async || {
        let health = api.get("/health").await.ok()?.json(200).ok()?;
        (health["ready"] == true).then_some(())
    };
    until("the server knows a whole model", PATIENCE, health).await
}

#[tokio::test]
async fn the_page_shows_the_swarm_and_chats() -> Result<()> {
    let Some(program) = chromium()? else {
        return Ok(());
    };
    let mut swarm = serve("demo", &FOUR_SPANS, &[]).await?;
    join(&mut swarm, "demo", &["0..4", "3..8"], &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let api = Api::start(&swarm.client("api"), &["--api-key", KEY]).await?;
    ready(&api).await?;
    let mut page = Browser::start(&program, 1440, 900).await?;
    page.open(&api.url).await?;

    a_key_is_asked_for(&mut page).await?;
    page.until("document.querySelectorAll('#map .rows li').length === 6")
        .await?;
    let map = page.text("#map").await?;
    for node in swarm.nodes() {
        let ready = node.ready.as_ref().context("it serves")?;
        let name = &ready.peer[ready.peer.len() - 6..];
        ensure!(map.contains(name), "no {name} in {map}");
    }
    let tile = page.text("#tiles").await?;
    ensure!(tile.contains("8 of 8 layers"), "{tile}");

    a_chat(&mut page).await?;
    a_peer(&mut page).await?;
    a_route_is_drawn(&mut page, &api).await?;
    a_gap_is_seen(&mut page, &mut swarm).await?;
    the_server_goes_and_the_page_says_so(&mut page, api).await?;

    let foreign: Vec<&str> = page
        .asked()
        .into_iter()
        .filter(|url| !url.starts_with("http://127.0.0.1:") && !url.starts_with("data:"))
        .collect();
    ensure!(foreign.is_empty(), "it asked elsewhere: {foreign:?}");
    page.close().await?;
    swarm.stop().await;
    Ok(())
}

async fn a_key_is_asked_for(page: &mut Browser) -> Result<()> {
    page.until("document.querySelector('#key-dialog')?.open")
        .await?;
    page.write("not-the-key").await?;
    page.press("Enter").await?;
    page.until("document.querySelector('#key-why').textContent.includes('refused')")
        .await?;
    page.until("document.querySelector('#key-dialog').open")
        .await?;
    page.write(KEY).await?;
    page.press("Enter").await?;
    page.until("document.querySelector('#link').dataset.state === 'live'")
        .await?;
    let kept = "localStorage.getItem('shoal-key') === null && sessionStorage.getItem('shoal-key') !== null && document.cookie === ''";
    page.until(kept).await
}

async fn a_chat(page: &mut Browser) -> Result<()> {
    page.evaluate("document.querySelector('#chat-text').focus()")
        .await?;
    page.write(QUESTION).await?;
    page.press("Enter").await?;
    page.until("document.querySelectorAll('.bubble').length === 2")
        .await?;
    page.until(
        "document.querySelector('.bubble.assistant .about')?.textContent.includes('privacy open')",
    )
    .await?;
    let said = page.text(".bubble.assistant .said").await?;
    ensure!(said.len() > 20, "{said}");
    let about = page.text(".bubble.assistant .about").await?;
    ensure!(about.contains("/s") && about.contains("0.."), "{about}");
    // It ended, and is told of without its words.
    page.until("document.querySelector('#finished tbody')?.textContent.includes('answered')")
        .await?;
    let seen = page.evaluate("fetch('/swarm', {headers: {Authorization: 'Bearer ' + sessionStorage.getItem('shoal-key')}}).then((r) => r.text())").await?;
    let seen = seen.as_str().unwrap_or_default();
    ensure!(seen.contains("\"answered\":1"), "{seen}");
    ensure!(!seen.contains("fox"), "a word of a prompt is in {seen}");

    // Another question is broken off.
    page.evaluate("document.querySelector('#chat-text').focus()")
        .await?;
    page.write("And then?").await?;
    page.press("Enter").await?;
    page.until("!document.querySelector('#chat-stop').hidden")
        .await?;
    page.evaluate("document.querySelector('#chat-stop').click()")
        .await?;
    page.until("document.querySelector('#chat-stop').hidden")
        .await
}

async fn a_peer(page: &mut Browser) -> Result<()> {
    page.evaluate("document.querySelector('#map .row').focus()")
        .await?;
    page.press("Enter").await?;
    page.until("document.querySelector('#panel .verdict')")
        .await?;
    let panel = page.text("#panel").await?;
    for words in [
        "Why it is or is not used",
        "Seen from here",
        "serves",
        "/ip4/127.0.0.1/",
        "shoal-node/",
    ] {
        ensure!(
            panel.to_lowercase().contains(&words.to_lowercase()),
            "no {words} in {panel}"
        );
    }
    page.press("Escape").await?;
    page.until("document.querySelector('#panel').hidden && document.activeElement.matches('.row')")
        .await
}

async fn a_route_is_drawn(page: &mut Browser, api: &Api) -> Result<()> {
    let key = format!("Authorization: Bearer {KEY}");
    let stream = asking(api, 1500, &[&key]).await?;
    page.until("document.querySelector('#map .routes path.route')?.getAttribute('d').length > 10")
        .await?;
    page.until("document.querySelector('#requests .stage')?.textContent === 'answers'")
        .await?;
    let request = page.text("#requests").await?;
    ensure!(
        request.contains("tokens/s") && request.contains("0.."),
        "{request}"
    );
    // Whoever hangs up is gone from the list.
    drop(stream);
    page.until("document.querySelectorAll('#requests li.request').length === 0")
        .await
}

/// The only holder of the first layer goes: the map has a gap, and says which.
async fn a_gap_is_seen(page: &mut Browser, swarm: &mut Swarm) -> Result<()> {
    for node in [0, 4] {
        let node = swarm.nodes_mut().get_mut(node).context("no such node")?;
        node.process.signal(Signal::TERM)?;
    }
    page.until("document.querySelector('#map .copies [data-copies=none]')")
        .await?;
    let tiles = page.text("#tiles").await?;
    ensure!(
        tiles.contains("missing") && tiles.contains("nobody holds 0.."),
        "{tiles}"
    );
    Ok(())
}

async fn the_server_goes_and_the_page_says_so(page: &mut Browser, api: Api) -> Result<()> {
    let errors: Vec<String> = page
        .errors()
        .into_iter()
        .map(Value::to_string)
        .filter(|error| !error.contains("401"))
        .collect();
    ensure!(errors.is_empty(), "{errors:?}");
    // It does not wait for the page, which watches without end.
    api.stop(PATIENCE / 20).await?;
    page.until("document.querySelector('#link').dataset.state === 'lost'")
        .await?;
    page.until("!document.querySelector('#notice').hidden")
        .await
}

#[tokio::test]
async fn what_the_pictures_show() -> Result<()> {
    let (Some(folder), Some(program)) = (pictures(), chromium()?) else {
        return Ok(());
    };
    std::fs::create_dir_all(&folder)?;
    take(&folder, &program).await
}

async fn take(folder: &Path, program: &Path) -> Result<()> {
    let spans = [
        "0..3", "2..5", "4..7", "6..8", "0..4", "3..8", "1..6", "5..8", "0..2",
    ];
    let mut swarm = serve("demo", &spans, &[]).await?;
    let client = swarm.client("client");
    client.until_covered(8, PATIENCE).await?;
    let api = Arc::new(Api::start(&swarm.client("api"), &[]).await?);
    ready(&api).await?;
    let mut page = Browser::start(program, 1440, 860).await?;
    page.prefer("light").await?;
    page.open(&api.url).await?;
    page.until("document.querySelectorAll('#map .rows li').length === 9")
        .await?;
    page.evaluate("document.querySelector('#chat-text').focus()")
        .await?;
    page.write(QUESTION).await?;
    page.press("Enter").await?;
    page.until(
        "document.querySelector('.bubble.assistant .about')?.textContent.includes('privacy open')",
    )
    .await?;
    let _running = keep_asking(&api, 2);
    page.until("document.querySelectorAll('#map .routes path.route').length === 2")
        .await?;
    page.until("document.querySelectorAll('#requests .stage').length === 2")
        .await?;
    let routes = page.text("#requests").await?;
    let on_a_route = |node: &&mut Node| {
        let ready = node.ready.as_ref();
        ready.is_some_and(|ready| routes.contains(&ready.peer[ready.peer.len() - 6..]))
    };
    let lost = swarm.nodes_mut().iter_mut().find(on_a_route);
    let lost = lost.context("no node of the swarm is on a route")?;
    lost.process.signal(Signal::KILL)?;
    // Some seconds of a curve.
    page.until("document.querySelector('.curve .line').getAttribute('d').split('L').length > 6")
        .await?;
    page.until("[...document.querySelectorAll('#requests .losses li')].some((it) => it.textContent.includes('new route'))")
        .await?;
    page.until("document.querySelector('#map .row[data-state=off]')")
        .await?;
    page.evaluate("document.activeElement.blur()").await?;
    page.picture(&folder.join("dashboard-light.png")).await?;
    page.prefer("dark").await?;
    page.picture(&folder.join("dashboard-dark.png")).await?;
    page.evaluate("document.querySelector('#map .row').click()")
        .await?;
    page.until("document.querySelector('#panel .verdict')")
        .await?;
    page.picture(&folder.join("dashboard-peer.png")).await?;
    page.press("Escape").await?;
    page.resize(390, 844).await?;
    page.picture(&folder.join("dashboard-phone.png")).await?;
    page.close().await?;
    swarm.stop().await;
    Ok(())
}
