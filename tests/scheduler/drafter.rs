//! A draft model saves sweeps, changes no answer, and makes way where memory is wanted for answers.

use airstream::engine::{Engine, ModelId, ModelOptions, Opening, Options, Spent};
use airstream::format::quant::QuantType;
use pair::write_pair;
use support::synth::SynthSpec;

use super::drafts::read_in_bursts;
use super::*;

/// A model, one that says the same in a quarter of the bytes, one that never does, and one that does not know all tokens.
struct Models {
    folder: TempDir,
}

impl Models {
    fn new(arch: Arch) -> Models {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name| folder.path().join(name);
        let spec = SynthSpec {
            layers: 5,
            ..SynthSpec::new(arch, QuantType::F32, 7)
        };
        write_pair(&spec, &path("large"), &path("good")).expect("written");
        for (name, vocab) in [("bad", 320), ("narrow", 300)] {
            let other = SynthSpec {
                layers: 1,
                vocab,
                ..SynthSpec::new(arch, QuantType::Q8_0, 8)
            };
            write(&other, &path(name)).expect("written");
        }
        Models { folder }
    }

    fn options(&self, drafter: Option<&str>, sessions: usize, context: usize) -> Options {
        let usual = serving::options(sessions, context, None);
        Options {
            model: ModelOptions {
                drafts: drafter.is_none().then_some(0),
                draft_model: drafter.map(|name| self.folder.path().join(name)),
                ..usual.model
            },
            ..usual
        }
    }

    fn open_in(&self, options: &Options) -> Serving {
        let large = self.folder.path().join("large");
        Serving::open_with(&[("m", large)], options, Limits::default())
    }

    /// With a draft model, in so little memory that a sweep of the large one reads almost all of it.
    fn open(&self, drafter: Option<&str>, sessions: usize, context: usize) -> Serving {
        let mut options = self.options(drafter, sessions, context);
        if drafter.is_some() {
            options.memory = Some(1);
            let files = [(self.folder.path().join("large"), options.model.clone())];
            let refused = Engine::new(&files, &options).err();
            let refused = refused.expect("a byte is too little");
            let said = refused.remedy().split("MiB").next();
            let mib = said.and_then(|said| said.rsplit(' ').next()?.parse::<u64>().ok());
            let mib = mib.expect("it says what would do");
            options.memory = Some(mib << 20);
        }
        self.open_in(&options)
    }
}

fn spent(serving: &Serving) -> Spent {
    serving.scheduler.spent(None).expect("the first model")
}

/// A request whose answer does not repeat itself.
fn varied(prompt: &[u32], count: u32, seed: u64) -> Generate {
    let request = seeded(prompt, count, seed);
    Generate {
        sampling: Sampling {
            temperature: 3.0,
            ..request.sampling
        },
        ..request
    }
}

fn requests(random: &mut Random) -> Vec<Generate> {
    let request = |i: u64| {
        let tokens = prompt(random, 2 + i % 5 * 17);
        let count = 20 + random.below(30) as u32;
        match i % 3 {
            0 => greedy(&tokens, count),
            _ => varied(&tokens, count, i),
        }
    };
    (0..4).map(request).collect()
}

#[test]
fn it_saves_sweeps_and_changes_no_token() {
    // Gemma's windows have left behind what wrong drafts want back.
    for arch in [Arch::Llama, Arch::Gemma3] {
        let models = Models::new(arch);
        let requests = requests(&mut Random(3));
        let mut without = models.open(None, 1, 256);
        let expected: Vec<_> = requests.iter().map(|r| without.ask(r).tokens).collect();
        for sessions in [1, 4] {
            let mut with = models.open(Some("good"), sessions, 256);
            let slots = with.scheduler.engine().pages_free();
            for (client, request) in requests.iter().enumerate() {
                with.submit(tag(client as u32, 0), request)
                    .expect("room for all");
            }
            with.finish();
            for (client, expected) in expected.iter().enumerate() {
                let answer = &with.answers[&tag(client as u32, 0)];
                assert_eq!(&answer.tokens, expected, "{arch:?}, request {client}");
                assert!(done(Reason::Length)(&answer.ending));
            }
            let (slow, fast) = (spent(&without), spent(&with));
            assert!(fast.drafts_right > 0 && fast.drafting > Duration::ZERO);
            if sessions == 1 {
                let saved = slow.sweeps - fast.sweeps;
                assert!(3 * saved > slow.sweeps, "{saved} of {} saved", slow.sweeps);
            }
            assert_eq!(all_slots(&mut with), slots, "{arch:?}");
        }
    }
}

#[test]
fn one_that_is_always_wrong_is_hardly_asked() {
    let models = Models::new(Arch::Llama);
    let request = varied(&[5, 6, 7], 200, 1);
    let expected = models.open(None, 1, 256).ask(&request).tokens;
    let mut with = models.open(Some("bad"), 1, 256);
    assert_eq!(with.ask(&request).tokens, expected);
    let spent = spent(&with);
    assert!(spent.drafting > Duration::ZERO);
    // How many it is asked for depends on what a draft costs beside a sweep, that is, on time. One that was trusted all
    // along would be asked for 15 a token.
    assert!(
        spent.drafts < 2 * spent.tokens(),
        "{} of {} tokens",
        spent.drafts,
        spent.tokens()
    );
}

#[test]
fn one_that_does_not_know_all_tokens_leaves_out_conversations_that_have_others() {
    let models = Models::new(Arch::Llama);
    let (mut without, mut with) = (
        models.open(None, 1, 256),
        models.open(Some("narrow"), 1, 256),
    );
    for (last, asked) in [(310, false), (3, true)] {
        let before = spent(&with).drafting;
        // No answer has other tokens than those.
        let logit_bias = (0..40).map(|token| (token, 40.0)).collect();
        let request = varied(&[5, 6, last], 20, 6);
        let sampling = Sampling {
            logit_bias,
            ..request.sampling
        };
        let request = Generate {
            sampling,
            ..request
        };
        assert_eq!(with.ask(&request).tokens, without.ask(&request).tokens);
        assert_eq!(spent(&with).drafting > before, asked, "{last}");
    }
}

#[test]
fn a_conversation_goes_on_whatever_it_knows_of_it() {
    for arch in [Arch::Llama, Arch::Gemma3] {
        let models = Models::new(arch);
        let (mut without, mut with) =
            (models.open(None, 2, 256), models.open(Some("good"), 2, 256));
        let turn = |name: &str, token: u32| Generate {
            session: Some(name.into()),
            ..varied(&[token, 9, 8], 30, 2)
        };
        let mut all = |request: &Generate| {
            let (a, b) = (with.ask(request), without.ask(request));
            assert_eq!((a.tokens, a.ending), (b.tokens, b.ending), "{arch:?}");
        };
        for token in 0..4 {
            all(&turn("a", token));
            all(&turn("b", 50 + token));
        }
        // Its session is taken by another, and begins anew.
        all(&turn("c", 100));
        all(&turn("a", 101));
        all(&varied(&[5, 6, 7], 500, 4));
        assert!(spent(&with).drafts_right > 200);
    }
}

#[test]
fn a_client_that_stops_reading_in_the_middle_of_its_drafts_misses_nothing() {
    let models = Models::new(Arch::Llama);
    let request = varied(&[5, 6, 7], 60, 3);
    let expected = models.open(None, 1, 256).ask(&request).tokens;
    for taken in [1, 2, 3, 5] {
        let mut serving = models.open(Some("good"), 1, 256);
        let tokens = read_in_bursts(&mut serving, &request, taken);
        assert_eq!(tokens, expected, "{taken} events at a time");
        assert!(taken == 1 || spent(&serving).drafts_right > 0);
    }
}

/// Answers that want all the pages that there are take those of the draft model too.
#[test]
fn its_pages_make_way_for_answers() {
    let models = Models::new(Arch::Llama);
    let long = |client: u32| varied(&prompt(&mut Random(client.into()), 600), 80, 5);
    let mut without = models.open(None, 1, 1024);
    let expected: Vec<_> = (0..4)
        .map(|client| without.ask(&long(client)).tokens)
        .collect();
    let mut with = models.open(Some("good"), 4, 1024);
    let slots = with.scheduler.engine().pages_free();
    for client in 0..4 {
        with.submit(tag(client, 0), &long(client)).expect("room");
    }
    with.finish();
    let mut whole = 0;
    for client in 0..4 {
        let answer = &with.answers[&tag(client, 0)];
        assert!(expected[client as usize].starts_with(&answer.tokens));
        whole += usize::from(done(Reason::Length)(&answer.ending));
    }
    assert!(whole > 0, "at least one is answered to the end");
    assert_eq!(all_slots(&mut with), slots);
}

#[test]
fn it_comes_and_goes_with_its_model_and_stays_in_memory() {
    let models = Models::new(Arch::Llama);
    let mut options = models.options(None, 2, 256);
    options.memory = Some(40 << 20);
    let mut serving = models.open_in(&options);
    let slots = serving.scheduler.engine().pool().slots;
    let with = models.options(Some("good"), 2, 256).model;
    let large = models.folder.path().join("large");
    let read = || Opening::read(&large, &with).expect("sound");
    for _ in 0..2 {
        let reserved = serving.scheduler.reserve("n", read()).expect("room");
        let id = serving
            .scheduler
            .admit("n", 1, reserved.build())
            .expect("built");
        let engine = serving.scheduler.engine();
        assert_eq!(engine.models().count(), 2, "nobody sees the third");
        let of = |drafter: bool| {
            let shares = engine.budget();
            let own = shares
                .iter()
                .filter(|s| s.model == Some(id) && s.drafter == drafter);
            own.count()
        };
        assert_eq!((of(false), of(true)), (1, 1));
        let request = Generate {
            model: Some("n".into()),
            ..greedy(&[1, 2, 3], 40)
        };
        let of_other = greedy(&[1, 2, 3], 40);
        assert_eq!(serving.ask(&request).tokens, serving.ask(&of_other).tokens);
        let engine = serving.scheduler.engine();
        let drafter = engine.drafter(id).expect("it is there");
        assert_eq!(engine.drafter(ModelId::FIRST), None);
        let resident = engine.store().resident_bytes_of(drafter);
        assert!(resident >= engine.weight_bytes(drafter), "{resident} bytes");
        // A budget that could not hold it is refused.
        let all = engine.pool().memory;
        let refused = serving.scheduler.set_memory(4 << 20).err();
        assert_eq!(refused.map(|e| e.kind()), Some(Kind::Budget));
        assert_eq!(serving.scheduler.engine().pool().memory, all);
        serving
            .scheduler
            .unload("n", serving.now)
            .expect("it is there");
    }
    assert_eq!(serving.scheduler.engine().pool().slots, slots);
}
