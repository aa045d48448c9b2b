// Package tig stands in for a package of nerdctl's own, which is not published as a module.
//
// A helper for nerdctl's tests names its type T. nerdctl is linked with that helper and never calls it.
package tig

// T is what the helper uses of a test.
type T interface {
	FailNow()
	Helper()
	Log(args ...any)
}
