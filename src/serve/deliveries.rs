//! From the scheduler's events to the clients' outboxes, and the account of what was done.

use std::sync::Arc;

use super::front::Place;
use super::in_keys;
use super::outbox::Outbox;
use super::status::Work;
use crate::engine::request::{Event, Tag};
use crate::engine::scheduler::Flow;
use crate::error::{Error, Kind};

/// Where the events of a request go, and the place that it has until its last one.
type Delivery = (Tag, Arc<Outbox>, Option<Place>);

/// Where the events of each request go.
#[derive(Default)]
pub struct Deliveries {
    outboxes: Vec<Delivery>,
    /// Errors that end requests the scheduler knows nothing of (any more), for outboxes that were full.
    late: Vec<(Tag, Arc<Outbox>, Error)>,
    /// Requests and tokens so far; sweeps are counted elsewhere.
    pub work: Work,
}

impl Deliveries {
    /// Room for `requests` requests at a time.
    pub fn new(requests: usize) -> Deliveries {
        Deliveries {
            outboxes: Vec::with_capacity(requests),
            ..Deliveries::default()
        }
    }

    /// A request was taken on.
    pub fn begin(&mut self, tag: Tag, outbox: Arc<Outbox>, place: Option<Place>) {
        self.work.requests += 1;
        self.outboxes.push((tag, outbox, place));
    }

    /// A request was not taken on.
    pub fn refuse(&mut self, tag: Tag, outbox: Arc<Outbox>, error: Error) {
        self.work.requests += 1;
        self.fail(tag, outbox, error);
    }

    fn fail(&mut self, tag: Tag, outbox: Arc<Outbox>, error: Error) {
        self.work.ended += 1;
        self.work.failed += 1;
        let error = Error::new(error.kind(), error.what(), in_keys(error.remedy()));
        if outbox.put(tag.request, &Event::from(&error)) == Flow::Full {
            self.late.push((tag, outbox, error));
        }
    }

    /// Tries again what found no room.
    pub fn catch_up(&mut self) {
        let full = |(tag, outbox, error): &(Tag, Arc<Outbox>, Error)| {
            outbox.put(tag.request, &Event::from(error)) == Flow::Full
        };
        self.late.retain(full);
    }

    /// A client is gone, and its requests with it.
    pub fn forget(&mut self, client: u32) {
        let before = self.outboxes.len();
        self.outboxes.retain(|(tag, ..)| tag.client != client);
        self.work.ended += (before - self.outboxes.len()) as u64;
    }

    /// The requests that are not answered yet.
    pub fn tags(&self) -> impl Iterator<Item = Tag> + '_ {
        self.outboxes.iter().map(|(tag, ..)| *tag)
    }

    /// Puts an event into its client's outbox.
    pub fn deliver(&mut self, tag: Tag, event: &Event<'_>) -> Flow {
        let Some(place) = self.outboxes.iter().position(|(of, ..)| *of == tag) else {
            return Flow::Gone;
        };
        if let Event::Error {
            code: Kind::Stalled,
            text,
            remedy,
        } = event
        {
            // The scheduler says this once, to a client whose outbox is full: it must hear it all the same if it ever
            // reads on.
            let (tag, outbox, _) = self.outboxes.swap_remove(place);
            self.fail(
                tag,
                outbox,
                Error::new(Kind::Stalled, text.as_ref(), remedy.as_ref()),
            );
            return Flow::Taken;
        }
        let outbox = &self.outboxes[place].1;
        let flow = match event {
            Event::Error { code, text, remedy } => {
                let (code, text, remedy) = (*code, text.as_ref().into(), in_keys(remedy));
                outbox.put(tag.request, &Event::Error { code, text, remedy })
            }
            event => outbox.put(tag.request, event),
        };
        if flow == Flow::Full {
            return flow;
        }
        match event {
            Event::Accepted {
                prompt_tokens,
                cached_tokens,
            } => {
                self.work.prompt_tokens += u64::from(prompt_tokens - cached_tokens);
            }
            Event::Token { .. } => self.work.answer_tokens += 1,
            Event::Error { .. } => self.work.failed += 1,
            Event::Done { .. } => {}
        }
        if event.is_last() || flow == Flow::Gone {
            self.work.ended += 1;
            self.outboxes.swap_remove(place);
        }
        flow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stalled_client_that_reads_on_is_told_why_its_answer_ended() {
        let outbox = Arc::new(Outbox::new(1));
        let tag = Tag {
            client: 1,
            request: 7,
        };
        let mut deliveries = Deliveries::new(1);
        deliveries.begin(tag, Arc::clone(&outbox), None);
        let token = Event::Token {
            index: 0,
            id: 1,
            text: "word".into(),
        };
        while deliveries.deliver(tag, &token) == Flow::Taken {}
        let stalled = Error::new(Kind::Stalled, "too slow", "read");
        assert_eq!(deliveries.deliver(tag, &Event::from(&stalled)), Flow::Taken);
        assert_eq!(deliveries.deliver(tag, &token), Flow::Gone);
        let mut last = None;
        while let Some((taken, _)) = outbox.take() {
            last = Some(taken.answer().is_last());
            deliveries.catch_up();
        }
        assert_eq!(last, Some(true));
        assert_eq!(
            (
                deliveries.work.requests,
                deliveries.work.ended,
                deliveries.work.failed
            ),
            (1, 1, 1)
        );
        assert_eq!(deliveries.tags().count(), 0);
    }
}
