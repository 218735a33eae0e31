package credentials

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

const (
	// maxRepositories is how many repositories credentials are kept of. A node has images of some hundreds at most.
	maxRepositories = 4096
	// maxSize is how long the values of one pull's credentials may be together, in bytes. Tokens have some
	// thousands; the kernel and registries stop at headers of 8 to 64 KiB.
	maxSize = 64 << 10
	// maxOthers is how many credentials of other repositories of a host are tried. A registry takes
	// wrong ones for an attack.
	maxOthers = 3
	// grace is for how long Forget leaves alone what was given: the pull that it came with may not have got to
	// its snapshots yet.
	grace = time.Hour
)

// A Keychain knows the credentials of registries. It is made by [Open].
type Keychain struct {
	dir   string
	log   *slog.Logger
	limit int // maxRepositories, but in tests

	// disk is held by who writes files, from the change in kept to the end of its writing, so that
	// of two pulls of one repository the same is last in memory and on disk. It is taken before mu.
	disk sync.Mutex

	// mu guards what follows, and is never held across I/O.
	mu    sync.Mutex
	kept  map[string]*given // by repository; what is on disk
	tried []*given          // of pulls under way, oldest first
	last  time.Time         // when the newest was given, or k was opened
}

// given is what was given for one repository. It does not change.
type given struct {
	repository string // as name.Repository.Name has it
	host       string
	at         time.Time
	config     authn.AuthConfig // without Auth, which says the same as Username and Password
}

var (
	_ authn.Keychain        = (*Keychain)(nil)
	_ authn.ContextKeychain = (*Keychain)(nil)
)

// Remember keeps a for the repository of image, a reference as users and the CRI write it ("debian:12",
// "registry/repository@sha256:…"), instead of what was given for that repository before. An empty a
// changes nothing. Values with a NUL or line break are refused, and those that are too long. If a cannot be
// written to disk, that is an error too, and a is used until the process ends.
func (k *Keychain) Remember(image string, a authn.AuthConfig) error {
	done, err := k.try(image, a)
	if err != nil {
		return err
	}
	return done(true)
}

// try has a used for the repository of image until done is called. If they were good they are kept.
func (k *Keychain) try(image string, a authn.AuthConfig) (done func(good bool) error, err error) {
	if a, err = normal(a); err != nil {
		return nil, fmt.Errorf("image %q: its credentials are not kept: %w", image, err)
	}
	if a == (authn.AuthConfig{}) {
		return func(bool) error { return nil }, nil
	}
	ref, err := name.ParseReference(image)
	if err != nil {
		return nil, fmt.Errorf("image %q: its credentials are not kept: want the name of an image in a registry, REPOSITORY[:TAG][@DIGEST]", image)
	}
	repo := ref.Context()
	k.mu.Lock()
	defer k.mu.Unlock()
	// What is given later is newer, also when the clock was set back. Without the monotonic reading, which
	// what comes from the disk does not have.
	if now := time.Now().Round(0); now.After(k.last) {
		k.last = now
	} else {
		k.last = k.last.Add(1)
	}
	g := &given{repo.Name(), repo.RegistryStr(), k.last, a}
	k.tried = append(k.tried, g)
	return func(good bool) error {
		if good {
			return k.keep(g)
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.drop(g)
		return nil
	}, nil
}

// drop ends the trying of g. k.mu is held.
func (k *Keychain) drop(g *given) {
	k.tried = slices.DeleteFunc(k.tried, func(t *given) bool { return t == g })
}

// keep makes of g what its repository has, unless there is something newer.
func (k *Keychain) keep(g *given) error {
	k.disk.Lock()
	defer k.disk.Unlock()
	k.mu.Lock()
	k.drop(g)
	if old := k.kept[g.repository]; old != nil && old.at.After(g.at) {
		k.mu.Unlock()
		return nil
	}
	k.kept[g.repository] = g
	out := k.trim()
	k.mu.Unlock()

	err := k.write(g)
	for _, old := range out {
		err = errors.Join(err, k.remove(old))
	}
	return err
}

// trim takes the oldest out of k.kept until it is within the limit. k.mu is held, if others know k.
func (k *Keychain) trim() (out []*given) {
	for len(k.kept) > k.limit {
		var oldest *given
		for _, g := range k.kept {
			if oldest == nil || g.at.Before(oldest.at) {
				oldest = g
			}
		}
		delete(k.kept, oldest.repository)
		out = append(out, oldest)
	}
	return out
}

// Forget forgets what was given for repositories of which keep returns false. keep gets names as
// name.Repository.Name has them, "index.docker.io/library/debian"; it may take its time, and may use k.
// What was given within the last hour stays without asking: it may belong to a pull that has no snapshot
// yet. An error names files that could not be removed; the others are.
func (k *Keychain) Forget(keep func(repository string) bool) error {
	k.mu.Lock()
	list := make([]*given, 0, len(k.kept))
	for _, g := range k.kept {
		list = append(list, g)
	}
	k.mu.Unlock()
	var errs error
	for _, g := range list {
		if time.Since(g.at) > grace && !keep(g.repository) {
			errs = errors.Join(errs, k.forget(g))
		}
	}
	return errs
}

func (k *Keychain) forget(g *given) error {
	k.disk.Lock()
	defer k.disk.Unlock()
	k.mu.Lock()
	same := k.kept[g.repository] == g // or it was given again since
	if same {
		delete(k.kept, g.repository)
	}
	k.mu.Unlock()
	if !same {
		return nil
	}
	return k.remove(g)
}

// Resolve is [Keychain.ResolveContext] without a context.
func (k *Keychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), target)
}

// ResolveContext returns the first of [Keychain.Candidates], authn.Anonymous if there are none. It returns
// an error if docker's configuration cannot be read and there is nothing else.
func (k *Keychain) ResolveContext(ctx context.Context, target authn.Resource) (authn.Authenticator, error) {
	var failed error
	for a, err := range k.Candidates(ctx, target) {
		if err != nil {
			failed = err
		} else if a != authn.Anonymous || failed == nil {
			return a, nil
		}
	}
	return nil, failed
}

// Candidates returns everything that may be accepted for target, a repository or a registry, in the order in
// which it should be tried. No credentials come twice, and authn.Anonymous is always there and last. An
// error stands in the place of docker's configuration if that cannot be read; more comes after it. A
// credential helper runs only when the walk gets to it.
func (k *Keychain) Candidates(ctx context.Context, target authn.Resource) iter.Seq2[authn.Authenticator, error] {
	return func(yield func(authn.Authenticator, error) bool) {
		own, others := k.given(target)
		var offered []authn.AuthConfig
		offer := func(c authn.AuthConfig) bool {
			if c == (authn.AuthConfig{}) || slices.Contains(offered, c) {
				return true
			}
			offered = append(offered, c)
			return yield(authn.FromConfig(c), nil)
		}
		for _, c := range own {
			if !offer(c) {
				return
			}
		}
		if c, err := docker(ctx, target); err != nil {
			if !yield(nil, err) {
				return
			}
		} else if !offer(c) {
			return
		}
		for _, c := range others {
			if !offer(c) {
				return
			}
		}
		yield(authn.Anonymous, nil)
	}
}

// docker returns what docker's configuration and credential helpers have for target, or nothing.
func docker(ctx context.Context, target authn.Resource) (authn.AuthConfig, error) {
	a, err := authn.Resolve(ctx, authn.DefaultKeychain, target)
	if err != nil {
		return authn.AuthConfig{}, fmt.Errorf("docker's configuration, for %s: %w", target.RegistryStr(), err)
	}
	c, err := authn.Authorization(ctx, a)
	if err != nil {
		return authn.AuthConfig{}, fmt.Errorf("docker's configuration, for %s: %w", target.RegistryStr(), err)
	}
	return *c, nil
}

// given returns what was given for target, and for others of its host, each in the order of trying.
func (k *Keychain) given(target authn.Resource) (own, others []authn.AuthConfig) {
	repository, host := target.String(), target.RegistryStr()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, g := range slices.Backward(k.tried) {
		if g.repository == repository {
			own = append(own, g.config)
		}
	}
	var neighbours []*given
	for _, g := range k.kept {
		if g.repository == repository {
			own = append(own, g.config)
		} else if g.host == host {
			neighbours = append(neighbours, g)
		}
	}
	slices.SortFunc(neighbours, func(a, b *given) int { return b.at.Compare(a.at) })
	for _, g := range neighbours {
		if len(others) < maxOthers && !slices.Contains(others, g.config) && !slices.Contains(own, g.config) {
			others = append(others, g.config)
		}
	}
	return own, others
}

// normal returns a without Auth, whose user and password it uses if a has none. It
// refuses what cannot be part of an HTTP header.
func normal(a authn.AuthConfig) (authn.AuthConfig, error) {
	if a.Auth != "" && a.Username == "" && a.Password == "" {
		// With and without padding, as docker and the kubelet take it.
		text, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(a.Auth, "=\r\n "))
		user, password, ok := strings.Cut(string(text), ":")
		if err != nil || !ok {
			return authn.AuthConfig{}, errors.New("auth is not the base64 of USER:PASSWORD: make the pull secret again")
		}
		a.Username, a.Password = user, strings.Trim(password, "\x00") // docker and containerd trim it too
	}
	a.Auth = ""
	size := 0
	for _, f := range []struct{ what, value string }{
		{"user name", a.Username}, {"password", a.Password},
		{"identity token", a.IdentityToken}, {"registry token", a.RegistryToken},
	} {
		if strings.ContainsAny(f.value, "\x00\r\n") {
			return authn.AuthConfig{}, fmt.Errorf("the %s has a line break or a NUL: make the pull secret again, without a newline at its end", f.what)
		}
		size += len(f.value)
	}
	if size > maxSize {
		return authn.AuthConfig{}, fmt.Errorf("they have %d bytes, more than the %d that a registry could be sent: check the pull secret", size, maxSize)
	}
	return a, nil
}
