# make help lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo manual test race bench starts fuzz lint check clean

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
MODULES := $(dir $(shell git ls-files -co --exclude-standard go.mod "*/go.mod" 2>/dev/null || echo go.mod))
FUZZTIME ?= 30s
BENCH ?= .
CONVERT ?= Convert/.*/level=7/chunk=192/group=128|Plain/.*/level=[67]|Stargz
CACHE ?= $(or $(LAZULI_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lazuli)
COUNT ?= 1

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/lazuli, one static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/lazuli ./cmd/lazuli

demo: build ## a Python job from a lazy image, beside a full pull and unpack (root; IMAGE=ref, JOB='cmd arg…')
	LAZULI_BUILT=1 deploy/demo.sh

manual: build ## what docs/containerd.md says, step by step with a containerd of its own (root; IMAGE=ref, JOB='cmd arg…')
	@[[ -n "$${CONTAINERD_BIN:-}" ]] || export CONTAINERD_BIN=$$(deploy/tools.sh containerd); LAZULI=$(CURDIR)/bin/lazuli deploy/containerd.sh

test: build ## all tests; as root, or those that mount are skipped (CI=true: a skip is a failure)
	@for m in $(MODULES); do (cd $$m && "$(CURDIR)/deploy/test.sh" -timeout 40m ./...); done

race: ## all tests of the main module under the race detector
	deploy/test.sh -race -timeout 50m ./...

bench: ## benchmarks: of packages, of the converter and its peers, against the plain kernel (root; BENCH=regexp)
	go test -run '^$$' -bench '$(BENCH)' -benchmem -timeout 60m ./fs/...
	[[ -e $(CACHE)/images/py/index.json ]] || go run ./integration/debian -dir $(CACHE)/images py
	LAZULI_BENCH_IMAGE=oci:$(CACHE)/images/py go test -run '^$$' -bench '$(CONVERT)' -benchtime 1x -timeout 120m ./convert
	go test -run '^$$' -bench '$(BENCH)' -benchtime 1x -timeout 120m ./integration
	$(MAKE) starts

starts: ## cold starts: images, links and systems in turn, as a table, JSON and a picture in .cache/starts (root; hours; STARTS=flags, see --help)
	go run ./integration/bench -out .cache/starts $(STARTS)

fuzz: ## each fuzz target for FUZZTIME (30s)
	@grep -rlE --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u | while read -r dir; do \
		grep -hoE '^func Fuzz[A-Za-z0-9_]+' $$dir/*_test.go | cut -d' ' -f2 | while read -r f; do \
			echo "$$dir $$f"; go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$dir </dev/null; done; done

lint: ## go vet and gofmt
	@for m in $(MODULES); do (cd $$m && go vet ./...); done
	@bad=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); [[ -z $$bad ]] || { echo "gofmt -w $$bad" >&2; exit 1; }

check: lint test ## lint and test

clean: ## remove what was built and cached
	rm -rf bin .cache
