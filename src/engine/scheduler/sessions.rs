//! Which conversations a model holds, and which of them a new one may begin with. Pure.

use std::time::Duration;

use super::super::request::SessionName;

/// Whether somebody uses a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// It holds nothing.
    Free,
    /// It holds a conversation that may go on, or be what another begins with.
    Idle,
    /// A request is being answered in it.
    Busy,
}

/// One session of the engine as the scheduler sees it.
#[derive(Debug)]
pub(super) struct Entry {
    /// What clients call it; empty for one that belongs to a single request.
    pub(super) name: SessionName,
    /// The conversation. The engine may hold keys and values for fewer positions; the rest is to be computed.
    pub(super) tokens: Vec<u32>,
    pub(super) used: Use,
    /// When it was last used.
    pub(super) since: Duration,
}

/// The sessions of one model, as many as the engine has.
#[derive(Debug)]
pub(super) struct Sessions {
    pub(super) entries: Vec<Entry>,
}

/// What a conversation could begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    /// The session that has most of it computed, and how many positions that are.
    pub(super) from: usize,
    pub(super) len: usize,
    /// How many it would be if those that are being computed were waited for.
    pub(super) coming: usize,
}

impl Sessions {
    /// `count` free sessions of at most `context` tokens. All memory is taken here.
    pub(super) fn new(count: usize, context: usize) -> Sessions {
        let entry = || Entry {
            name: SessionName::new(),
            tokens: Vec::with_capacity(context),
            used: Use::Free,
            since: Duration::ZERO,
        };
        Sessions {
            entries: (0..count).map(|_| entry()).collect(),
        }
    }

    /// The session of this name.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        let named = |entry: &Entry| entry.used != Use::Free && entry.name == name;
        self.entries.iter().position(named)
    }

    /// A session that holds nothing.
    pub(super) fn free(&self) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.used == Use::Free)
    }

    /// The best beginning for a conversation of these tokens; `computed` is what the engine holds of each session.
    ///
    /// Its last token is never part of it: somebody has to compute the logits after it.
    pub(super) fn prefix(&self, tokens: &[u32], computed: impl Fn(usize) -> usize) -> Prefix {
        let mut best = Prefix {
            from: 0,
            len: 0,
            coming: 0,
        };
        for (index, entry) in self.entries.iter().enumerate() {
            if entry.used == Use::Free {
                continue;
            }
            let common = common(&entry.tokens, tokens).min(tokens.len() - 1);
            let len = common.min(computed(index));
            if len > best.len {
                (best.from, best.len) = (index, len);
            }
            best.coming = best.coming.max(len);
            if entry.used == Use::Busy {
                best.coming = best.coming.max(common);
            }
        }
        best
    }

    /// The idle session that is missed least: one without a name before one with, and of these the least recently used.
    pub(super) fn oldest_idle(&self, may: impl Fn(usize) -> bool) -> Option<usize> {
        let idle = (self.entries.iter().enumerate())
            .filter(|(index, entry)| entry.used == Use::Idle && may(*index));
        idle.min_by_key(|(_, entry)| (!entry.name.is_empty(), entry.since))
            .map(|(index, _)| index)
    }

    /// An idle session whose time is up at `now`.
    pub(super) fn expired(
        &self,
        now: Duration,
        named: Duration,
        nameless: Duration,
    ) -> Option<usize> {
        let over = |entry: &Entry| entry.expiry(named, nameless).is_some_and(|at| at <= now);
        self.entries.iter().position(over)
    }

    /// When the next idle session's time is up.
    pub(super) fn next_expiry(&self, named: Duration, nameless: Duration) -> Option<Duration> {
        let expiries = self
            .entries
            .iter()
            .filter_map(|entry| entry.expiry(named, nameless));
        expiries.min()
    }
}

impl Entry {
    /// Begins a conversation.
    pub(super) fn begin(&mut self, name: Option<&SessionName>, tokens: &[u32]) {
        self.name = name.cloned().unwrap_or_default();
        self.tokens.clear();
        self.tokens.extend_from_slice(tokens);
    }

    /// Forgets it.
    pub(super) fn free(&mut self) {
        self.name.clear();
        self.tokens.clear();
        self.used = Use::Free;
    }

    fn expiry(&self, named: Duration, nameless: Duration) -> Option<Duration> {
        let kept = if self.name.is_empty() {
            nameless
        } else {
            named
        };
        (self.used == Use::Idle).then(|| self.since.saturating_add(kept))
    }
}

/// How many tokens two conversations have in common from the first on.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn table(of: &[(&str, &[u32], Use, u64)]) -> Sessions {
        let mut sessions = Sessions::new(of.len(), 16);
        for (entry, (name, tokens, used, since)) in sessions.entries.iter_mut().zip(of) {
            entry.begin(SessionName::try_from(*name).ok().as_ref(), tokens);
            (entry.used, entry.since) = (*used, s(*since));
        }
        sessions
    }

    #[test]
    fn the_longest_computed_beginning_is_found_and_a_longer_one_that_is_coming() {
        let sessions = table(&[
            ("", &[1, 2, 3], Use::Idle, 0),
            ("a", &[1, 2, 3, 4, 5, 6], Use::Busy, 0),
            ("b", &[9, 9], Use::Idle, 0),
            ("", &[1, 2, 3, 4, 5, 6, 7], Use::Free, 0),
        ]);
        let prefix =
            |tokens: &[u32], computed: [usize; 4]| sessions.prefix(tokens, |i| computed[i]);
        let found = |from, len, coming| Prefix { from, len, coming };
        assert_eq!(prefix(&[1, 2, 3, 4, 5, 6, 7], [3, 1, 2, 0]), found(0, 3, 6));
        assert_eq!(prefix(&[1, 2, 3, 4, 5, 6, 7], [3, 5, 2, 0]), found(1, 5, 6));
        assert_eq!(prefix(&[1, 2, 3], [3, 6, 2, 0]), found(0, 2, 2));
        assert_eq!(prefix(&[8], [3, 6, 2, 0]), found(0, 0, 0));
    }

    #[test]
    fn the_least_missed_goes_first() {
        let sessions = table(&[
            ("old", &[1], Use::Idle, 1),
            ("", &[1], Use::Idle, 5),
            ("", &[1], Use::Idle, 4),
            ("", &[1], Use::Busy, 2),
        ]);
        assert_eq!(sessions.oldest_idle(|_| true), Some(2));
        assert_eq!(sessions.oldest_idle(|i| i != 2), Some(1));
        assert_eq!(sessions.oldest_idle(|i| i == 0), Some(0));
        assert_eq!(sessions.oldest_idle(|i| i == 3), None);
        assert_eq!(sessions.find("old"), Some(0));
    }

    #[test]
    fn only_idle_sessions_expire() {
        let sessions = table(&[
            ("n", &[1], Use::Idle, 1),
            ("", &[1], Use::Idle, 2),
            ("", &[1], Use::Busy, 0),
        ]);
        let at = |now| sessions.expired(s(now), s(100), s(10));
        assert_eq!((at(11), at(12), at(101)), (None, Some(1), Some(0)));
        assert_eq!(sessions.next_expiry(s(100), s(10)), Some(s(12)));
    }
}
