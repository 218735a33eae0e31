package daemon

import (
	"context"
	"iter"

	"github.com/google/go-containerregistry/pkg/authn"

	"lazuli/snapshotter/credentials"
)

// keychain stands for the daemon's keychain before that is open: it lies in the root folder, which must be opened first.
type keychain struct{ k **credentials.Keychain }

func (k keychain) Resolve(r authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), r)
}

func (k keychain) ResolveContext(ctx context.Context, r authn.Resource) (authn.Authenticator, error) {
	return authn.Resolve(ctx, *k.k, r)
}

// Candidates is for fs/remote, which tries them one after the other.
func (k keychain) Candidates(ctx context.Context, r authn.Resource) iter.Seq2[authn.Authenticator, error] {
	return (*k.k).Candidates(ctx, r)
}
