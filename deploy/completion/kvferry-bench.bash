# bash completion for kvferry-bench
_kvferry_bench() {
  local cur=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  local common='--help --path --memory --sender-device --receiver-device --rounds --warm-up --seed --json
    --json-file --progress --show-metrics --sender-socket --receiver-socket --bin --set --time-limit --spoil'
  local models='llama-3-8b llama-3-70b qwen3-235b-a22b deepseek-r1 deepseek-r1-fp8 gpt-oss-120b minimax-m3-like'
  local words
  case $previous in
    --path | --paths) words='local shm tcp' ;;
    --memory) words='host cuda cuda-vmm' ;;
    --over) words='fragment-bytes fragments bytes' ;;
    --model) words=$models ;;
    --json-file | --sender-socket | --receiver-socket | --bin | --places | --plot)
      mapfile -t COMPREPLY < <(compgen -f -- "$cur")
      compopt -o filenames 2>/dev/null
      return ;;
    --sender-device | --receiver-device | --rounds | --warm-up | --seed | --set | --time-limit | --spoil | \
      --fragments | --fragment-bytes | --tokens | --pair | --block-tokens | --bytes | --calls | --transfers | \
      --sizes | --layers | --values) return ;;
    *)
      if [ "$COMP_CWORD" -eq 1 ]; then
        words='--help fragments model latency concurrency compare sweep'
      else
        case ${COMP_WORDS[1]} in
          fragments) words="$common --fragments --fragment-bytes --places --step" ;;
          model) words="$common --model --tokens --pair --block-tokens" ;;
          latency) words="$common --bytes --fragment-bytes --calls" ;;
          concurrency) words="$common --transfers --sizes --model --pair --layers" ;;
          compare) words="$common --fragments --fragment-bytes" ;;
          sweep) words="$common --over --values --bytes --fragment-bytes --paths --plot --no-limits" ;;
        esac
      fi ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}
complete -F _kvferry_bench kvferry-bench
