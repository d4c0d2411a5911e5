//! What clients read: whole characters, up to a stop string; and conversations that go on.

#[path = "support/models.rs"]
mod models;
#[path = "support/serving.rs"]
mod serving;

use airstream::engine::request::{Generate, Prompt, Reason, Sampling};
use airstream::engine::scheduler::Limits;
use airstream::error::Kind;
use airstream::text::Message;
use serving::{Answer, Ending, Serving};

const QUESTION: &str = "Why is the sky blue?";

fn ask(prompt: Prompt) -> Generate {
    Generate {
        sampling: Sampling::greedy(),
        max_tokens: Some(40),
        ..Generate::new(prompt)
    }
}

fn reason(answer: &Answer) -> Option<Reason> {
    match answer.ending {
        Some(Ending::Done(reason, _)) => Some(reason),
        _ => None,
    }
}

#[test]
fn an_answer_ends_before_a_stop_string_wherever_tokens_cut_it() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut serving = Serving::open(&[("m", &model)], 2, 256, None, Limits::default());
    let whole = serving.ask(&ask(Prompt::Text(QUESTION.into())));
    assert_eq!(reason(&whole), Some(Reason::Length));
    assert!(whole.text.len() > 80, "{}", whole.text);
    // Every piece of the answer is a stop string once, at all offsets to its tokens.
    for start in 20..32 {
        let stop = &whole.text[start..start + 11];
        let end = whole.text.find(stop).expect("a part of it");
        let stopped = serving.ask(&Generate {
            stop: vec!["never said".into(), stop.into()],
            ..ask(Prompt::Text(QUESTION.into()))
        });
        assert_eq!(stopped.text, whole.text[..end], "{stop:?}");
        assert_eq!(reason(&stopped), Some(Reason::Stop));
        assert!(stopped.tokens.len() < whole.tokens.len());
    }
    // What only looks like the beginning of one comes out in the end.
    let last = &whole.text[whole.text.len() - 6..];
    let held = serving.ask(&Generate {
        stop: vec![format!("{last} and more")],
        ..ask(Prompt::Text(QUESTION.into()))
    });
    assert_eq!((&held.text, reason(&held)), (&whole.text, reason(&whole)));
}

#[test]
fn a_text_that_cannot_fit_is_refused_before_it_is_cut_into_tokens() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut serving = Serving::open(&[("m", &model)], 1, 256, None, Limits::default());
    let begun = std::time::Instant::now();
    let long = "word ".repeat(10 << 20);
    let refused = serving
        .submit(serving::tag(1, 0), &ask(Prompt::Text(long)))
        .expect_err("50 MiB are too much");
    assert_eq!(refused.kind(), Kind::Budget);
    assert!(begun.elapsed().as_millis() < 500, "{:?}", begun.elapsed());
    assert!(refused.what().contains(" tokens or more, "), "{refused}");
    // What was counted is told as it is.
    let tokens = ask(Prompt::Tokens(vec![7; 300]));
    let refused = serving.submit(serving::tag(1, 1), &tokens);
    let refused = refused.expect_err("44 are too many");
    assert!(refused.what().contains(" 300 tokens, "), "{refused}");
    // Behind a conversation they may be more.
    let go_on = Generate {
        session: Some("robot".into()),
        ..ask(Prompt::Raw("one ".repeat(300)))
    };
    let refused = serving.submit(serving::tag(1, 2), &go_on);
    let refused = refused.expect_err("it is too long alone");
    assert!(refused.what().contains(" tokens or more, "), "{refused}");
}

#[test]
fn a_conversation_in_a_session_is_the_one_of_its_messages() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut serving = Serving::open(&[("m", &model)], 3, 512, None, Limits::default());
    let in_session = |text: &str| Generate {
        session: Some("robot".into()),
        system: Some("You are a robot. Be brief.".into()),
        ..ask(Prompt::Text(text.into()))
    };
    let first = serving.ask(&in_session("What do you see?"));
    let second = serving.ask(&in_session("And to the left?"));
    let (prompt, cached) = second.accepted.expect("accepted");
    let held = first.accepted.expect("accepted").0 + first.tokens.len() as u32;
    assert!(
        cached + 2 >= held && prompt > held,
        "{cached} of {prompt}, {held} held"
    );

    // A client that keeps the conversation itself gets the same answers.
    let mut messages = vec![
        Message::new("system", "You are a robot. Be brief."),
        Message::new("user", "What do you see?"),
    ];
    let mut other = Serving::open(&[("m", &model)], 3, 512, None, Limits::default());
    assert_eq!(
        other.ask(&ask(Prompt::Messages(messages.clone()))).text,
        first.text
    );
    messages.push(Message::new("assistant", first.text.as_str()));
    messages.push(Message::new("user", "And to the left?"));
    let answer = other.ask(&ask(Prompt::Messages(messages)));
    assert_eq!(answer.text, second.text);
    assert!(
        answer.accepted.expect("accepted").1 > 30,
        "its beginning was kept"
    );
}

#[test]
fn bias_and_penalties_reach_the_sampler() {
    let Some(model) = models::smollm2() else {
        return;
    };
    let mut serving = Serving::open(&[("m", &model)], 2, 256, None, Limits::default());
    let plain = serving.ask(&ask(Prompt::Text(QUESTION.into())));
    let with = |sampling: Sampling| Generate {
        sampling,
        ..ask(Prompt::Text(QUESTION.into()))
    };
    let banned = serving.ask(&with(Sampling {
        logit_bias: vec![(plain.tokens[0], f32::NEG_INFINITY)],
        ..Sampling::greedy()
    }));
    assert!(!banned.tokens.contains(&plain.tokens[0]));
    let most = |answer: &Answer| {
        let count = |token| answer.tokens.iter().filter(|&t| t == token).count();
        answer.tokens.iter().map(count).max()
    };
    let varied = serving.ask(&with(Sampling {
        frequency_penalty: 3.0,
        ..Sampling::greedy()
    }));
    assert!(most(&varied) < most(&plain), "{:?}", varied.text);
    let drawn = |seed| {
        with(Sampling {
            seed: Some(seed),
            temperature: 1.0,
            ..Sampling::default()
        })
    };
    let first = serving.ask(&drawn(1));
    assert_eq!(serving.ask(&drawn(1)).tokens, first.tokens);
    assert_ne!(serving.ask(&drawn(2)).tokens, first.tokens);
}
