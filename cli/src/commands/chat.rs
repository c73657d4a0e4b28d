//! `shoal chat`: several turns in one session, whose KV is kept (docs/decisions/0051).

use std::io::{BufRead, Write};

use engine::{Sampler, Vocab};
use node::answer::{Answer, Source, Stop, Words};
use tokio::sync::mpsc;

use crate::answer::{self, Question};
use crate::conversation::{Conversation, Line};
use crate::failure::Failure;
use crate::generation::Generation;
use crate::interrupt::Interrupt;
use crate::opening::Opening;
use crate::run_report::{Hop, Privacy, route_line};
use crate::session_args::SessionArgs;
use crate::swarm::Swarm;
use crate::terminal::{self, BOLD, HINT, paint};
use crate::{figures, tokens};

/// Talk with a model; the session keeps what was said.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  shoal chat
  shoal chat -m llama-1b --system \"You are terse.\"
  shoal chat --ctx 8192 --wire q8_0
  shoal chat --local-fallback llama-1b.gguf    goes on in this process when the swarm cannot

In the chat: /help /reset /system TEXT /quit. Ctrl-C ends an answer; at the prompt it ends the chat.")]
pub struct Args {
    /// The model: a name, the beginning of an id, or a GGUF file [default: the only one there is, else demo].
    #[arg(short, long, env = "SHOAL_MODEL", value_name = "NAME|ID|FILE")]
    model: Option<String>,

    /// A system message, for models with a chat template.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    #[command(flatten)]
    session: SessionArgs,

    #[command(flatten)]
    generation: Generation,

    #[command(flatten)]
    swarm: Swarm,
}

/// The context of a chat that does not say: room for a long talk, little enough that several fit.
const CTX_DEFAULT: u32 = 4096;

const HELP: &str = "\
/reset         forget what was said
/system TEXT   set the system message and forget what was said; without TEXT there is none
/quit          leave (also Ctrl-D)
//TEXT         say something that begins with a slash";

/// Reads lines until the user has had enough.
pub fn main(args: Args) -> anyhow::Result<()> {
    if args.session.privacy == Some(Privacy::Local) {
        return Err(Failure::usage(
            "a chat runs over the swarm; `--privacy local` has no peer to talk to",
        )
        .try_this("`shoal run --local MODEL \\\"...\\\"`")
        .into());
    }
    node::runtime::run(talk(args))?
}

async fn talk(args: Args) -> anyhow::Result<()> {
    let interrupt = Interrupt::listen();
    let opening = Opening {
        swarm: &args.swarm,
        model: args.model.as_deref(),
        session: &args.session,
        threads: None,
        verify: true,
        interrupt: &interrupt,
    };
    let opened = opening.over_swarm(|vocab, limit| args.n_ctx(vocab, limit));
    let ready = interrupt.or_end(opened).await?;
    let source = ready.source;
    terminal::note(route_line(
        &Hop::all(&source.route()),
        &Hop::all(&source.standbys()),
        ready.privacy,
        &args.session.travel.wire.to_string(),
    ));
    let vocab = ready.vocab.as_ref().ok_or_else(tokens::no_tokenizer)?;
    let mut chat = Chat {
        source,
        sampler: answer::sampler(&args.generation, args.generation.seed(), vocab.n_tokens())?,
        conversation: Conversation::new(args.system.clone()),
        transcript: Vec::new(),
        vocab,
        args: &args,
        interrupt: &interrupt,
    };
    chat.greet(&ready.model);
    let ended = chat.turns().await;
    chat.source.close().await;
    if let Some(member) = ready.member {
        member.leave().await;
    }
    ended
}

impl Args {
    /// The context to open, for a model that can chat.
    fn n_ctx(&self, vocab: Option<&Vocab>, limit: u32) -> anyhow::Result<u32> {
        let vocab = vocab.ok_or_else(tokens::no_tokenizer)?;
        if self.system.is_some() && vocab.chat_template().is_none() {
            return Err(Failure::usage(
                "this model has no chat template, so a system message has no place in it",
            )
            .into());
        }
        Ok(match self.generation.ctx {
            Some(_) => self.generation.n_ctx(0, limit)?,
            None => limit.min(CTX_DEFAULT),
        })
    }
}

/// A talk under way.
struct Chat<'a> {
    source: Source,
    sampler: Sampler,
    conversation: Conversation,
    /// Without a chat template: everything typed and generated, as tokens.
    transcript: Vec<u32>,
    vocab: &'a Vocab,
    args: &'a Args,
    interrupt: &'a Interrupt,
}

impl Chat<'_> {
    fn greet(&self, model: &str) {
        if terminal::stdin_is_terminal() {
            let n_ctx = self.source.n_ctx();
            terminal::note_styled(format!(
                "{} · {n_ctx} tokens of context · {} for commands",
                paint(BOLD, model),
                paint(HINT, "/help")
            ));
        }
        if self.vocab.chat_template().is_none() {
            terminal::note("this model has no chat template: it goes on with what you type");
        }
    }

    async fn turns(&mut self) -> anyhow::Result<()> {
        let mut lines = lines();
        loop {
            show_prompt();
            let line = tokio::select! {
                biased;
                () = self.interrupt.wait() => {
                    if terminal::stdin_is_terminal() {
                        terminal::note("");
                    }
                    return Err(Failure::interrupted().into());
                }
                line = lines.recv() => line,
            };
            let Some(line) = line else { return Ok(()) };
            match Line::parse(&line) {
                Line::Blank => {}
                Line::Quit => return Ok(()),
                Line::Help => terminal::note_styled(HELP),
                Line::Reset => self.reset(None),
                Line::System(text) => self.reset(Some(text.map(str::to_string))),
                Line::Unknown(word) => terminal::warn(format!(
                    "there is no /{}; /help lists what there is",
                    figures::printable(word, 40)
                )),
                Line::Say(text) => self.say(text).await?,
            }
        }
    }

    fn reset(&mut self, system: Option<Option<String>>) {
        if let Some(system) = system {
            if system.is_some() && self.vocab.chat_template().is_none() {
                terminal::warn(
                    "this model has no chat template, so a system message has no place in it",
                );
                return;
            }
            self.conversation.set_system(system);
        }
        self.conversation.reset();
        self.transcript.clear();
        terminal::note("forgotten; the next question begins anew");
    }

    /// One turn.
    async fn say(&mut self, text: &str) -> anyhow::Result<()> {
        self.conversation.ask(text);
        let prompt = match self.prompt(text) {
            Ok(prompt) => prompt,
            Err(error) => {
                self.conversation.take_back();
                terminal::warn(format!("{error:#}"));
                return Ok(());
            }
        };
        if prompt.len() >= self.source.n_ctx() as usize {
            self.conversation.take_back();
            self.full();
            return Ok(());
        }
        let answer = self.generate(&prompt).await?;
        terminal::stream("\n")?;
        if answer.stop == Stop::Interrupted {
            self.interrupt.clear();
        }
        if answer.stop == Stop::ContextFull {
            self.full();
        }
        self.transcript = prompt;
        self.transcript.extend_from_slice(&answer.tokens);
        self.conversation.answer(answer.text);
        Ok(())
    }

    fn full(&self) {
        terminal::warn(format!(
            "the context is full ({} tokens): /reset begins anew, `shoal chat --ctx N` has more room where the model allows it",
            self.source.n_ctx()
        ));
    }

    fn prompt(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        match self.vocab.chat_template() {
            Some(template) => tokens::of_chat(self.vocab, template, &self.conversation.messages()),
            None if self.transcript.is_empty() => tokens::of_text(self.vocab, text),
            None => {
                let mut tokens = self.transcript.clone();
                tokens.extend(self.vocab.tokenize(&format!("\n{text}"), false, false)?);
                Ok(tokens)
            }
        }
    }

    async fn generate(&mut self, prompt: &[u32]) -> anyhow::Result<Answer> {
        let show = |_, piece: &str| {
            if !piece.is_empty() {
                terminal::stream(piece)?;
            }
            Ok(())
        };
        let question = Question {
            prompt,
            words: Words::Text(self.vocab),
            generation: &self.args.generation,
            cancel: self.interrupt,
            journal: None,
        };
        answer::generate(&mut self.source, &mut self.sampler, question, show).await
    }
}

fn show_prompt() {
    if terminal::stdin_is_terminal() {
        let mut err = anstream::stderr();
        let _ = write!(err, "{} ", paint(HINT, ">"));
        let _ = err.flush();
    }
}

/// Lines of stdin, read on a thread of their own: such a read cannot be cancelled, and must not keep
/// the chat from ending.
fn lines() -> mpsc::Receiver<String> {
    let (send, receive) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if send.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receive
}
