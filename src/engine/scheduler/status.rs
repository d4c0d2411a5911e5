//! What the scheduler holds at the moment, for people and for their programs.

use serde::Serialize;

use super::Scheduler;
use super::request::State;
use super::sessions::Use;
use crate::engine::request::SessionName;

/// What there is to do and to do it with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Requests that wait for a session.
    pub waiting: usize,
    /// Requests that are being answered.
    pub running: usize,
    /// Requests whose clients do not take what they are told.
    pub stalled: usize,
    /// The models, in the order in which they came.
    pub models: Vec<ModelStatus>,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelStatus {
    /// What clients call it.
    pub name: String,
    /// Positions of a session.
    pub context: usize,
    /// Sweeps so far.
    pub sweeps: u64,
    /// Rows computed so far.
    pub rows: u64,
    /// Seconds of its sweeps.
    pub sweep_s: f64,
    /// Of these, waiting for reads with nothing to compute.
    pub stalled_s: f64,
    /// Bytes read from disk in its sweeps.
    pub read_bytes: u64,
    /// Sessions that it could have.
    pub sessions_max: usize,
    /// Those that hold something.
    pub sessions: Vec<SessionStatus>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SessionStatus {
    /// Its name; none for the conversation of a single request.
    pub name: Option<String>,
    /// Tokens of the conversation.
    pub tokens: usize,
    /// Of these, tokens whose keys and values are in memory.
    pub computed: usize,
    /// Whether it is in use.
    pub state: SessionState,
}

/// Whether a session is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// It can go on, or others can begin with what it holds.
    Idle,
    /// A request is being answered in it.
    Busy,
}

impl Scheduler {
    /// Requests that wait for a session, and requests that are being answered. Allocates nothing.
    pub fn requests(&self) -> (usize, usize) {
        let count = |wanted: fn(&State) -> bool| {
            let states = self.requests.iter().map(|request| &request.state);
            states.filter(|state| wanted(state)).count()
        };
        let running = count(|state| matches!(state, State::Running(_)));
        (count(|state| *state == State::Waiting), running)
    }

    /// Shows every session that holds something: its model, its name (empty for that of a single request), its tokens,
    /// and whether it is in use. Allocates nothing.
    pub fn each_session(&self, mut show: impl FnMut(&str, &SessionName, usize, SessionState)) {
        for hosted in &self.models {
            for entry in &hosted.sessions.entries {
                let state = match entry.used {
                    Use::Free => continue,
                    Use::Idle => SessionState::Idle,
                    Use::Busy => SessionState::Busy,
                };
                let model = hosted.vocabulary.model();
                show(model, &entry.name, entry.tokens.len(), state);
            }
        }
    }

    /// What there is at the moment. It takes memory, so it is for those who ask now and then.
    pub fn status(&self) -> Status {
        let (waiting, running) = self.requests();
        Status {
            waiting,
            running,
            stalled: self
                .requests
                .iter()
                .filter(|r| r.untold.since.is_some())
                .count(),
            models: (0..self.models.len())
                .map(|place| self.model_status(place))
                .collect(),
        }
    }

    fn model_status(&self, place: usize) -> ModelStatus {
        let hosted = &self.models[place];
        let sessions = hosted.sessions.entries.iter().enumerate();
        let held = sessions.filter(|(_, entry)| entry.used != Use::Free);
        ModelStatus {
            name: hosted.vocabulary.model().to_owned(),
            context: hosted.vocabulary.context(),
            sweeps: hosted.spent.sweeps,
            rows: hosted.spent.rows,
            sweep_s: hosted.spent.time.as_secs_f64(),
            stalled_s: hosted.spent.stalled.as_secs_f64(),
            read_bytes: hosted.spent.read_bytes,
            sessions_max: hosted.sessions.entries.len(),
            sessions: held
                .map(|(index, entry)| SessionStatus {
                    name: (!entry.name.is_empty()).then(|| entry.name.as_str().to_owned()),
                    tokens: entry.tokens.len(),
                    computed: self.engine.session_len(hosted.id, index),
                    state: match entry.used {
                        Use::Busy => SessionState::Busy,
                        _ => SessionState::Idle,
                    },
                })
                .collect(),
        }
    }
}
