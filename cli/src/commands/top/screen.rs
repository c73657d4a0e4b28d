//! The terminal while `shoal top` runs: taken, drawn on, and given back whatever happens.

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::Duration;

use api::swarm::{PeerDetail, SwarmView};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::app::{Act, App};
use super::draw::draw;
use super::source::Source;
use crate::failure::Failure;
use crate::interrupt::Interrupt;

/// How often the swarm is looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// How often keys and news are looked for.
const TICK: Duration = Duration::from_millis(100);
/// News that wait for the screen; further ones are dropped, the next look brings newer.
const NEWS_MAX: usize = 8;

/// What the screen is told.
enum News {
    View(Box<SwarmView>),
    Peer(Box<PeerDetail>),
    /// Nothing came, for this reason.
    Nothing(String),
    End,
}

/// A peer to look at, for a model.
type Wish = (String, String);

/// Draws what `source` sees until somebody presses q or the process is told to stop.
///
/// # Errors
/// There is no terminal to draw on.
pub async fn watch(source: &Source, interrupt: &Interrupt) -> anyhow::Result<()> {
    let app = App::new(source.name(), source.sees_requests());
    let (say, news) = sync_channel(NEWS_MAX);
    let (wish, wishes) = mpsc::channel(1);
    let mut screen = tokio::task::spawn_blocking(move || run(app, &news, &wish));
    let ended = tokio::select! {
        ended = &mut screen => ended,
        () = look(source, &say, wishes, interrupt) => {
            let _ = say.send(News::End);
            screen.await
        }
    };
    ended?
}

/// Looks again and again, until the process is told to stop.
async fn look(
    source: &Source,
    say: &SyncSender<News>,
    mut wishes: mpsc::Receiver<Wish>,
    interrupt: &Interrupt,
) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut asked: Option<Wish> = None;
    loop {
        tokio::select! {
            biased;
            () = interrupt.wait() => return,
            wish = wishes.recv() => match wish {
                Some(wish) => asked = Some(wish),
                None => return std::future::pending().await,
            },
            _ = ticks.tick() => {
                let news = match source.view().await {
                    Ok(view) => News::View(Box::new(view)),
                    Err(error) => News::Nothing(format!("{error:#}")),
                };
                let _ = say.try_send(news);
            }
        }
        if let Some((peer, model)) = asked.take() {
            let news = match source.peer(&peer, &model).await {
                Ok(detail) => News::Peer(Box::new(detail)),
                Err(error) => News::Nothing(format!("{error:#}")),
            };
            let _ = say.try_send(news);
        }
    }
}

fn run(app: App, news: &Receiver<News>, wish: &mpsc::Sender<Wish>) -> anyhow::Result<()> {
    // The hook that this sets gives the terminal back before a panic is printed.
    let mut terminal = ratatui::try_init().map_err(|error| {
        Failure::new(format!("this terminal cannot be drawn on: {error}"))
            .try_this("`shoal top --once`")
    })?;
    let _given_back = GivenBack;
    until_end(&mut terminal, app, news, wish)
}

/// Gives the terminal back when it goes.
struct GivenBack;

impl Drop for GivenBack {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

fn until_end(
    terminal: &mut DefaultTerminal,
    mut app: App,
    news: &Receiver<News>,
    wish: &mpsc::Sender<Wish>,
) -> anyhow::Result<()> {
    let mut changed = true;
    loop {
        loop {
            match news.try_recv() {
                Ok(News::View(view)) => app.see(*view),
                Ok(News::Peer(detail)) => app.look(*detail),
                Ok(News::Nothing(why)) => app.miss(why),
                Ok(News::End) | Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => break,
            }
            changed = true;
        }
        if std::mem::take(&mut changed) {
            terminal.draw(|frame| draw(frame, &mut app))?;
        }
        if !event::poll(TICK)? {
            continue;
        }
        // A resize needs nothing but the next frame.
        changed = true;
        let Event::Key(key) = event::read()? else {
            continue;
        };
        if key.kind == KeyEventKind::Release {
            continue;
        }
        match app.key(key) {
            Act::Nothing => {}
            Act::End => return Ok(()),
            Act::LookAt(peer, model) => {
                let _ = wish.try_send((peer, model));
            }
        }
    }
}
