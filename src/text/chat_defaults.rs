//! Templates for model files that have none.

use super::tokenizer::Tokenizer;

/// Many families: Qwen, SmolLM, Hermes.
const CHATML: &str = "\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

const GEMMA: &str = "\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}";

const LLAMA3: &str = "\
{{ bos_token }}{% for message in messages %}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}";

/// Llama 2 and the first Mistrals.
const LLAMA2: &str = "\
{% set ns = namespace(system='') %}{% for message in messages %}
{% if message.role == 'system' %}
{% set ns.system = '<<SYS>>\\n' ~ message.content ~ '\\n<</SYS>>\\n\\n' %}
{% elif message.role == 'user' %}
{{ bos_token }}[INST] {{ ns.system ~ message.content }} [/INST]{% set ns.system = '' %}
{% else %}
 {{ message.content }} {{ eos_token }}
{%- endif %}{% endfor %}";

/// The usual template of an architecture, by the control tokens that the vocabulary has.
pub(super) fn template(architecture: &str, tokenizer: &Tokenizer) -> &'static str {
    if architecture.starts_with("gemma") {
        GEMMA
    } else if tokenizer.control("<|start_header_id|>").is_some() {
        LLAMA3
    } else if architecture.starts_with("qwen") || tokenizer.control("<|im_start|>").is_some() {
        CHATML
    } else {
        LLAMA2
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ChatTemplate, Message};

    fn render(source: &str, bos: &str, eos: &str) -> String {
        let messages = [
            Message::new("system", "S"),
            Message::new("user", "U"),
            Message::new("assistant", "A"),
            Message::new("user", "V"),
        ];
        ChatTemplate::new(source, bos, eos)
            .render(&messages, true)
            .unwrap()
    }

    #[test]
    fn chatml() {
        let golden = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n\
            <|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(render(super::CHATML, "", ""), golden);
    }

    #[test]
    fn gemma_folds_the_system_message() {
        let golden = "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n\
            <start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n";
        assert_eq!(render(super::GEMMA, "<bos>", "<eos>"), golden);
    }

    #[test]
    fn llama3() {
        let golden = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>\
            <|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>\
            <|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>\
            <|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>\
            <|start_header_id|>assistant<|end_header_id|>\n\n";
        assert_eq!(render(super::LLAMA3, "<|begin_of_text|>", ""), golden);
    }

    #[test]
    fn llama2() {
        let golden = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]";
        assert_eq!(render(super::LLAMA2, "<s>", "</s>"), golden);
    }
}
